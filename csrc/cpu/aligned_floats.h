// Floats that begin with a cache line.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace vstar {

struct Free {
  void operator()(float* p) const { std::free(p); }
};

using AlignedFloats = std::unique_ptr<float, Free>;

// Null where there is no memory; `count` is a multiple of a line's 16.
inline AlignedFloats aligned_floats(int64_t count) {
  return AlignedFloats(static_cast<float*>(std::aligned_alloc(64, size_t(count) * sizeof(float))));
}

}  // namespace vstar
