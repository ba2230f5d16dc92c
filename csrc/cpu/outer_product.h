// Products of a few rows with a few vectors of columns, kept in registers, and the transposition that lays columns out for them.
#pragma once
#include "activations.h"

namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxVectors = 4;  // of 32 registers: 16 sums, 4 vectors, 1 broadcast
constexpr int rows_for(int vectors) { return vectors == 4 ? 4 : vectors == 3 ? 6 : 8; }
#else
constexpr int kMaxVectors = 2;  // of 16 registers
constexpr int rows_for(int vectors) { return vectors == 2 ? 6 : 8; }
#endif

// A number of vectors in the fewest parts of at most kMaxVectors, of even sizes.
struct Parts {
  int64_t vectors;
  int64_t count() const { return (vectors + kMaxVectors - 1) / kMaxVectors; }
  int64_t first(int64_t part) const { return vectors * part / count(); }
  int64_t size(int64_t part) const { return first(part + 1) - first(part); }
};

// sums[r][n] = sum over k of a[r * a_row + k * a_step] * b[k * b_step + lanes of vector n]
template <int R, int N>
inline __attribute__((always_inline)) void outer(Floats (&sums)[R][N], const float* a, int64_t a_row, int64_t a_step,
                                                 const float* b, int64_t b_step, int64_t steps) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) sums[r][n] = Floats{};
  for (int64_t k = 0; k < steps; k++) {
    Floats vectors[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) vectors[n] = load(b + k * b_step + n * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const Floats x = fill(a[r * a_row + k * a_step]);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) sums[r][n] += x * vectors[n];
    }
  }
}

// packed[d * width + i] = rows[i * row_width + d], zero for rows up to the width
void pack_transposed(const float* rows, int64_t row_width, int64_t count, int64_t head_width, float* packed, int64_t width) {
  for (int64_t i = 0; i < width; i += kLanes)
    for (int64_t d = 0; d < head_width; d += kLanes) {
      Floats block[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; r++) block[r] = i + r < count ? load(rows + (i + r) * row_width + d) : Floats{};
      transpose(block);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; r++) store(packed + (d + r) * width + i, block[r]);
    }
}

}  // namespace
