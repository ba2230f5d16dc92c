// A linear layer over rows of float32 with what follows it, in whatever instruction set this object is compiled for.
//
// Weights come packed: panels of some columns, each (in, columns). A few rows times a panel stay in registers over the whole
// inner dimension; bias, residual or gate are added to them there, so that what a layer writes is written once.
#include <cmath>

#include "linear.h"
#include "outer_product.h"

namespace {

// Rows that a panel is multiplied by at once where only sums are kept: of 32 registers 24 hold them.
constexpr int rows_at(int vectors) { return kMaxVectors < 4 || vectors < 3 ? rows_for(vectors) : 24 / vectors; }
// Sums over more of the inner dimension than this are summed in turn: a single long one loses digits.
constexpr int64_t kDepth = 256;

template <int R, int N>
inline void multiply(Floats (&sums)[R][N], const vstar_linear_arguments& a, const float* x, const float* panel) {
  outer<R, N>(sums, x, a.in, 1, panel, N * kLanes, least(kDepth, a.in));
  for (int64_t k = kDepth; k < a.in; k += kDepth) {
    Floats more[R][N];
    outer<R, N>(more, x + k, a.in, 1, panel + k * N * kLanes, N * kLanes, least(kDepth, a.in - k));
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) sums[r][n] += more[r][n];
  }
}

// Asks for the lines that these rows add to and write and, in the first panel, for the rows after them: memory answers while
// the products run.
template <int R, int N>
inline void foresee(const vstar_linear_arguments& a, int64_t width, int64_t row, int64_t column) {
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) {
      const int64_t at = (row + r) * width + column + n * kLanes;
      __builtin_prefetch(a.out + at, 1);
      if (a.residual) __builtin_prefetch(a.residual + at);
    }
  if (column == 0)
    for (int64_t i = 0; i < R * a.in; i += 64 / int64_t(sizeof(float))) __builtin_prefetch(a.x + (row + R) * a.in + i);
}

// out[r][columns] = sums + bias + residual, or (sums + bias) * gelu(the gates' sums + bias)
template <int R, int N>
inline void rows_by_panel(const vstar_linear_arguments& a, const float* packed, int64_t width, int64_t row, int64_t column) {
  constexpr int64_t panel = N * kLanes;
  const float* x = a.x + row * a.in;
  foresee<R, N>(a, width, row, column);
  Floats sums[R][N], gates[R][N];
  multiply<R, N>(sums, a, x, packed + column * a.in);
  if (a.gate) multiply<R, N>(gates, a, x, packed + (vstar::round_up(width, panel) + column) * a.in);
  for (int n = 0; n < N; n++) {
    const int64_t c = column + n * kLanes, count = least(kLanes, width - c);
    if (count <= 0) break;
    const Floats bias = a.bias ? load_part(a.bias + c, count) : Floats{};
    const Floats gate_bias = a.bias && a.gate ? load_part(a.bias + width + c, count) : Floats{};
    for (int r = 0; r < R; r++) {
      const int64_t at = (row + r) * width + c;
      Floats y = sums[r][n] + bias;
      if (a.gate) y *= gelu(gates[r][n] + gate_bias);
      if (a.residual) y += count == kLanes ? load(a.residual + at) : load_part(a.residual + at, count);
      if (count == kLanes) store(a.out + at, y);
      else store_part(a.out + at, y, count);
    }
  }
}

template <int R, int N>
inline int64_t all_rows(const vstar_linear_arguments& a, const float* packed, int64_t width, int64_t row, int64_t end,
                        int64_t column) {
  for (; row + R <= end; row += R) rows_by_panel<R, N>(a, packed, width, row, column);
  return row;
}

inline int64_t width_of(const vstar_linear_arguments& a) { return a.gate ? a.out_features / 2 : a.out_features; }

// The widest panel among those that leave the fewest columns empty; a single vector has too few sums to be worth it.
inline int vectors_of(const vstar_linear_arguments& a) {
  const int64_t vectors = (width_of(a) + kLanes - 1) / kLanes;
  if (vectors == 1) return 1;
  int best = kMaxVectors;
  for (int n = kMaxVectors - 1; n > 1; n--)
    if (vstar::round_up(vectors, n) < vstar::round_up(vectors, best)) best = n;
  return best;
}
inline int64_t panel_of(const vstar_linear_arguments& a) { return vectors_of(a) * kLanes; }

template <int N>
void linear(const vstar_linear_arguments& a, const float* packed) {
  const int64_t width = width_of(a), end = a.rows;
  for (int64_t column = 0; column < width; column += N * kLanes) {
    int64_t row = 0;
    if (!a.gate) row = all_rows<rows_at(N), N>(a, packed, width, row, end, column);
    row = all_rows<rows_for(N), N>(a, packed, width, row, end, column);
    row = all_rows<2, N>(a, packed, width, row, end, column);
    all_rows<1, N>(a, packed, width, row, end, column);
  }
}

// Calls work(i, vector of row[i...], elements of it that are there) along a row.
template <class Work>
inline void along(const float* row, int64_t count, const Work& work) {
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) work(i, load(row + i), kLanes);
  if (whole < count) work(whole, load_part(row + whole, count - whole), count - whole);
}

// Lane r is the sum of the lanes of rows[r].
inline Floats sums_of(Floats (&rows)[kLanes]) {
  transpose(rows);
#pragma GCC unroll 4
  for (int step = kLanes / 2; step; step /= 2)
    for (int i = 0; i < step; i++) rows[i] += rows[i + step];
  return rows[0];
}

// A vector's worth of rows at a time, so that their sums are one vector.
void norm_some(const float* x, int64_t rows, const vstar_linear_arguments& a, float* out) {
  Floats sums[kLanes] = {}, rests[kLanes] = {}, squares[kLanes] = {};
  for (int64_t r = 0; r < rows; r++) along(x + r * a.in, a.in, [&](int64_t, Floats v, int64_t) { sums[r] += v; });
  const Floats count = fill(float(a.in)), guess = sums_of(sums) / count;
  for (int64_t r = 0; r < rows; r++)
    along(x + r * a.in, a.in, [&](int64_t, Floats v, int64_t there) {
      Floats off = v - fill(guess[r]);
      if (there < kLanes) off = load_part((const float*)&off, there);
      rests[r] += off;
      squares[r] += off * off;
    });
  // the first mean lost digits where the sum was large; what is left of it is small
  const Floats rest = sums_of(rests) / count, mean = guess + rest;
  const Floats variance = sums_of(squares) / count - rest * rest + fill(a.eps);
  for (int64_t r = 0; r < rows; r++) {
    const Floats scale = fill(1.0f / std::sqrt(variance[r]));
    along(x + r * a.in, a.in, [&](int64_t i, Floats v, int64_t there) {
      const Floats y = (v - fill(mean[r])) * scale;
      float* to = out + r * a.in + i;
      if (there == kLanes) store(to, y * load(a.norm_gain + i) + load(a.norm_shift + i));
      else store_part(to, y * load_part(a.norm_gain + i, there) + load_part(a.norm_shift + i, there), there);
    });
  }
}

}  // namespace

namespace vstar {

void VSTAR_NORM_ROWS(const vstar_linear_arguments& a, float* normed) {
  for (int64_t row = 0; row < a.rows; row += kLanes)
    norm_some(a.x + row * a.in, least(kLanes, a.rows - row), a, normed + row * a.in);
}

int64_t VSTAR_PANEL(const vstar_linear_arguments& a) { return panel_of(a); }

void VSTAR_PACK(const vstar_linear_arguments& a, int64_t panel, float* packed) {
  const int64_t width = width_of(a), columns = panel_of(a), panels = (width + columns - 1) / columns;
  const int64_t first = panel % panels * columns, from = panel < panels ? first : width + first;
  float* to = packed + panel * a.in * columns;
  const int64_t count = least(columns, width - first), whole = a.in / kLanes * kLanes;
  if (whole) pack_transposed(a.weight + from * a.in, a.in, count, whole, to, columns);
  for (int64_t k = whole; k < a.in; k++)
    for (int64_t i = 0; i < columns; i++) to[k * columns + i] = i < count ? a.weight[(from + i) * a.in + k] : 0.0f;
}

void VSTAR_LINEAR(const vstar_linear_arguments& a, const float* packed) {
  const int vectors = vectors_of(a);
  const auto run = vectors == 1 ? linear<1> : vectors == 2 ? linear<2>
                 : vectors == 3 ? linear<(kMaxVectors > 2 ? 3 : 2)> : linear<kMaxVectors>;
  run(a, packed);
}

}  // namespace vstar
