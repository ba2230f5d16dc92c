// The C interfaces of GEGLU and of group norm with SiLU, and their parts that are compiled for each instruction set.
#pragma once
#include "abi.h"

extern "C" {

// x (rows, 2 * inner): values, then gates; out (rows, inner) = value * gelu(gate). Both contiguous.
struct vstar_geglu_arguments {
  const void* x;
  void* out;
  int64_t rows, inner;
  int32_t dtype, isa, threads;
};

// x, out (items, rows, channels), contiguous; a group is `channels / groups` neighbours over all rows of an item.
struct vstar_groupnorm_silu_arguments {
  const void* x;
  const float *weight, *bias;  // (channels)
  void* out;
  int64_t items, rows, channels, groups;
  double eps;
  int32_t dtype, silu, isa, threads;
};

VSTAR_EXPORT int vstar_geglu(const vstar_geglu_arguments* arguments);
VSTAR_EXPORT int vstar_groupnorm_silu(const vstar_groupnorm_silu_arguments* arguments);
}

namespace vstar {

// Mean and sum of squared distances from it.
struct Moments {
  double mean, squares;
};

using Geglu = void (*)(const vstar_geglu_arguments&, int64_t begin_row, int64_t end_row);
// Moments of each group of one item over some rows; scratch holds 4 * channels, rounded up to kMaxLanes, floats.
using Measure = void (*)(const vstar_groupnorm_silu_arguments&, int64_t item, int64_t begin_row, int64_t end_row, float* scratch,
                         Moments* groups);
// out = silu(x * gain + shift) of one item over some rows; silu as asked; gain and shift are padded to kMaxLanes.
using Normalise = void (*)(const vstar_groupnorm_silu_arguments&, int64_t item, int64_t begin_row, int64_t end_row,
                           const float* gain, const float* shift);

}  // namespace vstar
