// A linear layer over rows of float32 with what follows it, in whatever instruction set this object is compiled for.
//
// Weights come packed: panels of some columns, each (in, columns). A few rows times a panel stay in registers over the whole
// inner dimension; bias, residual or gate are added to them there, so that what a layer writes is written once.
#include "fused.h"
#include "outer.h"

namespace {

// A panel is as wide as the registers allow, and half as wide where half holds every feature.
constexpr int kNarrow = 2;
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

// out[r][columns] = sums + bias + residual, or (sums + bias) * gelu(the gates' sums + bias)
template <int R, int N>
inline void rows_by_panel(const vstar_linear_arguments& a, const float* packed, int64_t width, int64_t row, int64_t column) {
  constexpr int64_t panel = N * kLanes;
  const float* x = a.x + row * a.in;
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
inline int64_t panel_of(const vstar_linear_arguments& a) {
  return (width_of(a) <= kNarrow * kLanes ? kNarrow : kMaxVectors) * kLanes;
}

template <int N>
void linear(const vstar_linear_arguments& a, const float* packed, int64_t begin, int64_t end) {
  const int64_t width = width_of(a);
  for (int64_t column = 0; column < width; column += N * kLanes) {
    int64_t row = all_rows<rows_for(N), N>(a, packed, width, begin, end, column);
    row = all_rows<2, N>(a, packed, width, row, end, column);
    all_rows<1, N>(a, packed, width, row, end, column);
  }
}

}  // namespace

namespace vstar {

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

void VSTAR_LINEAR(const vstar_linear_arguments& a, const float* packed, int64_t begin, int64_t end) {
  const auto run = panel_of(a) == kNarrow * kLanes ? linear<kNarrow> : linear<kMaxVectors>;
  run(a, packed, begin, end);
}

}  // namespace vstar
