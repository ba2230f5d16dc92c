// The C interface of temporal attention, and one unit of its work.
#pragma once
#include "abi.h"

extern "C" {

// q, out (batch, frames, positions, heads, head_dim) and k, v (batch, keys, ...): strides in elements of the first four axes.
struct vstar_attention {
  const void *q, *k, *v;
  void* out;
  const float* bias;  // contiguous: g (bias_batch, frames), or with dense set G (bias_batch, frames, keys)
  int64_t batch, frames, keys, positions, heads, head_dim, bias_batch;
  int64_t q_stride[4], k_stride[4], v_stride[4], out_stride[4];
  int32_t dtype, dense, isa, threads;  // isa counts from 0, the plainest; negative picks the best this machine runs
};

VSTAR_EXPORT int vstar_temporal_attention(const vstar_attention* arguments);
}

namespace vstar {

// The bias of (row i, key j < keys) is table[i + j * step], readable for every i below the padded row count; null is none.
struct Bias {
  const float* table;
  int64_t step, keys;
};

// One thread's memory: float32 rows of q, k and v for `heads` heads, a panel of transposed queries, a panel of scores.
struct Scratch {
  float *q_rows, *q_panel, *scores;
  int64_t row_width, heads;
};

// The rows that a panel of scores holds at most.
constexpr int64_t kMaxPanel = 64;

// Attends units of one batch item, position and head each, from `begin` to `end`.
using Attend = void (*)(const vstar_attention&, const Bias*, int64_t begin, int64_t end, Scratch);

}  // namespace vstar
