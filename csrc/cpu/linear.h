// The C interface of linear layers, and their parts that are compiled for each instruction set.
#pragma once
#include "abi.h"

extern "C" {

// out (rows, out_features) = x (rows, in) . weight (out_features, in) + bias + residual (rows, out_features); both may be null.
// With gate set, the first half of the features times gelu of the second: out (rows, out_features / 2). With norm_gain and
// norm_shift (in), every row of x is brought to mean 0 and variance 1 and scaled by them first. float32, contiguous.
struct vstar_linear_arguments {
  const float *x, *weight, *bias, *residual, *norm_gain, *norm_shift;
  float* out;
  int64_t rows, in, out_features;
  int32_t gate, isa, threads;
  float eps;
};

// Two layers over the same rows: what the first makes is what the second reads, and never leaves the cache.
// The first's `out` and residual and the second's `x`, isa and threads are ignored.
struct vstar_linear_pair_arguments {
  vstar_linear_arguments first, second;
};

VSTAR_EXPORT int vstar_linear(const vstar_linear_arguments* arguments);
VSTAR_EXPORT int vstar_linear_pair(const vstar_linear_pair_arguments* arguments);
}

namespace vstar {

// Columns of a panel; and lays out one panel of weights, values' panels before gates'.
using Panel = int64_t (*)(const vstar_linear_arguments&);
using Pack = void (*)(const vstar_linear_arguments&, int64_t panel, float* packed);
// All rows of x, normed.
using NormRows = void (*)(const vstar_linear_arguments&, float* normed);
// All rows by all panels.
using Linear = void (*)(const vstar_linear_arguments&, const float* packed);

}  // namespace vstar
