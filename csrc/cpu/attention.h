// What the parts of the CPU kernel share: the plain C ABI and the shape of one unit of work.
#pragma once
#include <cstdint>

extern "C" {

enum vstar_dtype { VSTAR_FLOAT32 = 0, VSTAR_BFLOAT16 = 1, VSTAR_FLOAT16 = 2 };
enum vstar_status { VSTAR_OK = 0, VSTAR_BAD_ARGUMENT = 1, VSTAR_NO_MEMORY = 2, VSTAR_NO_SUCH_ISA = 3 };

// q, out (batch, frames, positions, heads, head_dim) and k, v (batch, keys, ...): strides in elements of the first four axes.
struct vstar_attention {
  const void *q, *k, *v;
  void* out;
  const float* bias;  // contiguous: g (bias_batch, frames), or with dense set G (bias_batch, frames, keys)
  int64_t batch, frames, keys, positions, heads, head_dim, bias_batch;
  int64_t q_stride[4], k_stride[4], v_stride[4], out_stride[4];
  int32_t dtype, dense, isa, threads;  // isa counts from 0, the plainest; negative picks the best this machine runs
};

__attribute__((visibility("default"))) int vstar_temporal_attention(const vstar_attention* arguments);
__attribute__((visibility("default"))) const char* vstar_isa_name(int isa);  // null past the last, or if this machine lacks it
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

using Attend = void (*)(const vstar_attention&, const Bias*, int64_t begin, int64_t end, Scratch);

constexpr int64_t kMaxLanes = 16, kMaxPanel = 64;
inline constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Runs body(context) on up to `threads` threads, the caller's among them.
void parallel(void (*body)(void*), void* context, int threads);

}  // namespace vstar
