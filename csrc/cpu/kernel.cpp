// Temporal attention of one (batch, position, head) at a time, in whatever instruction set this object is compiled for.
//
// Scores are kept transposed, a vector's lanes being query rows: row maximum, softmax and row sum run down the keys without
// a horizontal step, the Toeplitz bias of a key is one unaligned load, and a NaN stays in its lane. A panel of up to four
// vectors of rows is finished before the next, so the only product of two frame counts is keys x 64 floats.
// std:: templates stay out: a weak symbol compiled here for AVX-512 could be the one the linker keeps for every caller.
#include "attention.h"
#include "vectors.h"

namespace {

using vstar::Bias;
using vstar::Scratch;

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxVectors = 4;  // of 32 registers: 16 sums, 4 vectors, 1 broadcast
constexpr int rows_for(int vectors) { return vectors == 4 ? 4 : vectors == 3 ? 6 : 8; }
#else
constexpr int kMaxVectors = 2;  // of 16 registers
constexpr int rows_for(int vectors) { return vectors == 2 ? 6 : 8; }
#endif

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

template <class Element>
void pack_rows(const Element* source, int64_t stride, int64_t rows, int64_t columns, float* packed, int64_t width) {
  for (int64_t i = 0; i < rows; i++, source += stride, packed += width) {
    int64_t d = 0;
    for (; d + kLanes <= columns; d += kLanes) store(packed + d, load(source + d));
    if (d < columns) store(packed + d, load_part(source + d, columns - d));
  }
}

// packed[d * width + i] = source[i * stride + d], zero for rows up to the width
template <class Element>
void pack_transposed(const Element* source, int64_t stride, int64_t rows, int64_t columns, float* packed, int64_t width) {
  for (int64_t i = 0; i < width; i += kLanes)
    for (int64_t d = 0; d < columns; d += kLanes) {
      const int64_t count = columns - d;
      Floats block[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; r++) {
        const Element* row = source + (i + r) * stride + d;
        block[r] = i + r >= rows ? Floats{} : count >= kLanes ? load(row) : load_part(row, count);
      }
      transpose(block);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; r++) store(packed + (d + r) * width + i, block[r]);
    }
}

template <int R, int N>
inline void score_rows(const float* k, int64_t k_width, const float* q, int64_t head_dim, float* scores, Floats (&peak)[N]) {
  Floats sums[R][N];
  outer<R, N>(sums, k, k_width, 1, q, N * kLanes, head_dim);
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      peak[n] = larger(sums[r][n], peak[n]);
      store(scores + (r * N + n) * kLanes, sums[r][n]);
    }
}

// scores[j][i] = k[j] . q[i] and peak[i] = its signed maximum over j
template <int N>
void score(const float* k, int64_t k_width, const float* q, int64_t head_dim, int64_t keys, float* scores, Floats (&peak)[N]) {
  constexpr int R = rows_for(N), width = N * kLanes;
  for (int n = 0; n < N; n++) peak[n] = fill(-__builtin_inff());
  int64_t j = 0;
  for (; j + R <= keys; j += R) score_rows<R, N>(k + j * k_width, k_width, q, head_dim, scores + j * width, peak);
  for (; j + 2 <= keys; j += 2) score_rows<2, N>(k + j * k_width, k_width, q, head_dim, scores + j * width, peak);
  for (; j < keys; j++) score_rows<1, N>(k + j * k_width, k_width, q, head_dim, scores + j * width, peak);
}

// scores += peak * bias, and peak becomes the maximum of the sums
template <int N>
void regularise(float* scores, int64_t keys, const Bias& bias, int64_t first_row, Floats (&peak)[N]) {
  Floats weight[N];
  for (int n = 0; n < N; n++) weight[n] = peak[n], peak[n] = fill(-__builtin_inff());
  const float* here = bias.table + first_row;
  for (int64_t j = 0; j < keys; j++, scores += N * kLanes, here += bias.step)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      Floats x = load(scores + n * kLanes);
      if (j < bias.keys) store(scores + n * kLanes, x += weight[n] * load(here + n * kLanes));
      peak[n] = larger(x, peak[n]);
    }
}

// scores = exp(scale * (scores - peak)) with scale in units of log 2; returns the row sums
template <int N>
void exponentiate(float* scores, int64_t keys, float scale, const Floats (&peak)[N], Floats (&total)[N]) {
  Floats offset[N];
  for (int n = 0; n < N; n++) offset[n] = peak[n] * scale, total[n] = Floats{};
  for (int64_t j = 0; j < keys; j++, scores += N * kLanes)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      const Floats x = exp2(load(scores + n * kLanes) * scale - offset[n]);
      store(scores + n * kLanes, x);
      total[n] += x;
    }
}

template <int R, int N, class Element>
inline void weigh_rows(const float* scores, int64_t width, const float* v, int64_t v_width, int64_t keys, const float* total,
                       Element* out, int64_t stride, int64_t rows, int64_t columns) {
  Floats sums[R][N];
  outer<R, N>(sums, scores, 1, width, v, v_width, keys);
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    if (r >= rows) break;
    const Floats inverse = fill(1.0f / total[r]);
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      const int64_t count = columns - n * kLanes;
      if (count >= kLanes) store(out + r * stride + n * kLanes, sums[r][n] * inverse);
      else store_part(out + r * stride + n * kLanes, sums[r][n] * inverse, count);
    }
  }
}

// out[i] = sum over j of scores[j][i] * v[j] / total[i], N vectors of the head's width
template <int N, class Element>
void weigh(const float* scores, int64_t width, const float* v, int64_t v_width, int64_t keys, const float* total, Element* out,
           int64_t stride, int64_t rows, int64_t columns) {
  constexpr int R = rows_for(N);
  int64_t i = 0;
  for (; i + R <= width && i < rows; i += R)
    weigh_rows<R, N>(scores + i, width, v, v_width, keys, total + i, out + i * stride, stride, rows - i, columns);
  for (; i < rows; i++)
    weigh_rows<1, N>(scores + i, width, v, v_width, keys, total + i, out + i * stride, stride, 1, columns);
}

struct Shape {
  int64_t keys, head_dim, width;  // width: head_dim rounded up to whole vectors
  float scale;
};

template <int N, class Element>
void panel(const Shape& shape, const Bias* bias, const Scratch& scratch, const Element* q, int64_t q_stride, Element* out,
           int64_t out_stride, int64_t first_row, int64_t rows) {
  constexpr int64_t width = N * kLanes;
  pack_transposed(q, q_stride, rows, shape.head_dim, scratch.q, width);
  Floats peak[N], total[N];
  score<N>(scratch.k, shape.width, scratch.q, shape.head_dim, shape.keys, scratch.scores, peak);
  if (bias) regularise<N>(scratch.scores, shape.keys, *bias, first_row, peak);
  exponentiate<N>(scratch.scores, shape.keys, shape.scale, peak, total);
  float totals[width];
  for (int n = 0; n < N; n++) store(totals + n * kLanes, total[n]);

  const int64_t vectors = shape.width / kLanes, groups = (vectors + kMaxVectors - 1) / kMaxVectors;
  for (int64_t group = 0; group < groups; group++) {
    const int64_t first = vectors * group / groups, count = vectors * (group + 1) / groups - first, d = first * kLanes;
    const auto run = count == 1 ? weigh<1, Element> : count == 2 ? weigh<2, Element>
                   : count == 3 ? weigh<(kMaxVectors > 2 ? 3 : 2), Element> : weigh<kMaxVectors, Element>;
    run(scratch.scores, width, scratch.v + d, shape.width, shape.keys, totals, out + d, out_stride, rows, shape.head_dim - d);
  }
}

template <class Element>
void attend(const vstar_attention& a, const Bias* biases, int64_t begin, int64_t end, Scratch scratch) {
  const Shape shape = {a.keys, a.head_dim, vstar::round_up(a.head_dim, kLanes), float(1.4426950408889634 / __builtin_sqrt(double(a.head_dim)))};
  const int64_t vectors = (a.frames + kLanes - 1) / kLanes, panels = (vectors + kMaxVectors - 1) / kMaxVectors;
  for (int64_t unit = begin; unit < end; unit++) {
    const int64_t h = unit % a.heads, p = unit / a.heads % a.positions, b = unit / a.heads / a.positions;
    const auto at = [=](const void* base, const int64_t* stride) {
      return (Element*)base + b * stride[0] + p * stride[2] + h * stride[3];
    };
    const Element* q = at(a.q, a.q_stride);
    Element* out = at(a.out, a.out_stride);
    const Bias& bias = biases[a.bias_batch == 1 ? 0 : b];
    // packed once: rows a power of two apart in the source would evict each other from the cache
    pack_rows(at(a.k, a.k_stride), a.k_stride[1], a.keys, a.head_dim, scratch.k, shape.width);
    pack_rows(at(a.v, a.v_stride), a.v_stride[1], a.keys, a.head_dim, scratch.v, shape.width);
    for (int64_t index = 0; index < panels; index++) {
      const int64_t first = vectors * index / panels, count = vectors * (index + 1) / panels - first, row = first * kLanes;
      const auto run = count == 1 ? panel<1, Element> : count == 2 ? panel<2, Element>
                     : count == 3 ? panel<(kMaxVectors > 2 ? 3 : 2), Element> : panel<kMaxVectors, Element>;
      const int64_t rows = a.frames - row < count * kLanes ? a.frames - row : count * kLanes;
      run(shape, bias.table ? &bias : nullptr, scratch, q + row * a.q_stride[1], a.q_stride[1], out + row * a.out_stride[1],
          a.out_stride[1], row, rows);
    }
  }
}

}  // namespace

namespace vstar {

void VSTAR_ATTEND(const vstar_attention& a, const Bias* biases, int64_t begin, int64_t end, Scratch scratch) {
  const auto run = a.dtype == VSTAR_FLOAT32 ? attend<float> : a.dtype == VSTAR_BFLOAT16 ? attend<BFloat16> : attend<Float16>;
  run(a, biases, begin, end, scratch);
}

}  // namespace vstar
