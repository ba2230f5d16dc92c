// The kernels compiled for each instruction set, and how an entry point picks those this machine runs.
#pragma once
#include <new>

#include "groupnorm_geglu.h"
#include "linear.h"
#include "temporal_attention.h"

extern "C" {

// The size of the arguments of attention, GEGLU, group norm, linear layer and pair of these: a caller can tell another build.
VSTAR_EXPORT int64_t vstar_size_of(int arguments);
VSTAR_EXPORT const char* vstar_isa_name(int isa);  // null past the last, or if this machine lacks it
}

namespace vstar {

// What is compiled for one instruction set.
struct Isa {
  const char* name;
  Attend attend;
  Geglu geglu;
  Measure measure;
  Normalise normalise;
  Pack pack;
  NormRows norm_rows;
  Linear linear;
  Panel panel;
};

// One of those this machine runs, plainest first, by its number: negative picks the best, null is not there.
const Isa* isa(int number);

// What every entry point does around its work: work(instruction set).
template <class Work>
int enter(bool valid, int number, const Work& work) {
  if (!valid) return VSTAR_BAD_ARGUMENT;
  const Isa* found = isa(number);
  if (!found) return VSTAR_NO_SUCH_ISA;
  try {
    work(*found);
  } catch (const std::bad_alloc&) {
    return VSTAR_NO_MEMORY;
  }
  return VSTAR_OK;
}

}  // namespace vstar
