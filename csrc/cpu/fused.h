// The C ABI of the elementwise and normalising ops, and the parts of them that are compiled for each instruction set.
#pragma once
#include "attention.h"

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

// Two layers over the same rows: what the first makes is what the second reads, and never leaves the cache. The first's `out`
// and residual, the second's `x`, isa and threads are not looked at.
struct vstar_linear_pair_arguments {
  vstar_linear_arguments first, second;
};

__attribute__((visibility("default"))) int64_t vstar_size_of(int arguments);
__attribute__((visibility("default"))) int vstar_linear(const vstar_linear_arguments* arguments);
__attribute__((visibility("default"))) int vstar_linear_pair(const vstar_linear_pair_arguments* arguments);
__attribute__((visibility("default"))) int vstar_geglu(const vstar_geglu_arguments* arguments);
__attribute__((visibility("default"))) int vstar_groupnorm_silu(const vstar_groupnorm_silu_arguments* arguments);
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

// Columns of a panel; and lays out one panel of weights, values' panels before gates'.
using Panel = int64_t (*)(const vstar_linear_arguments&);
using Pack = void (*)(const vstar_linear_arguments&, int64_t panel, float* packed);
// All rows of x, normed.
using NormRows = void (*)(const vstar_linear_arguments&, float* normed);
// All rows by all panels.
using Linear = void (*)(const vstar_linear_arguments&, const float* packed);

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

// Those this machine runs, plainest first, and one of them by its number: negative picks the best, null is not there.
const Isa* isa(int number);

}  // namespace vstar
