// Temporal attention of one (batch, position, head) at a time, in whatever instruction set this object is compiled for.
//
// Scores are kept transposed, a vector's lanes being query rows: row maximum, softmax and row sum run down the keys without
// a horizontal step, the Toeplitz bias of a key is one unaligned load, and a NaN stays in its lane. A panel of up to four
// vectors of rows is finished before the next, so the only product of two frame counts is keys x 64 floats.
// std:: templates stay out: a weak symbol compiled here for AVX-512 could be the one the linker keeps for every caller.
#include "outer_product.h"
#include "temporal_attention.h"

namespace {

using vstar::Bias;
using vstar::Scratch;

// The rows, one a frame, of some heads at one position.
template <class Element>
struct Rows {
  Element* base;
  int64_t frame, head;  // strides

  Rows(const void* tensor, const int64_t* stride, const vstar_attention& a, int64_t unit) : frame(stride[1]), head(stride[3]) {
    const int64_t h = unit % a.heads, p = unit / a.heads % a.positions, b = unit / a.heads / a.positions;
    base = (Element*)tensor + b * stride[0] + p * stride[2] + h * stride[3];
  }
};

struct Stage {
  float *q, *k, *v;
};

// Copies one row as float32. Where they are, rows lie megabytes apart, often by a power of two, and evict each other from the
// cache; and without the prefetch each waits for memory in turn (T = 64, one core: 19 against 14 GB/s).
template <class Element>
void stage_row(const Rows<const Element>& from, int64_t row, int64_t rows, int64_t heads, int64_t head_dim, float* to,
               int64_t head_width, int64_t row_width) {
  if (row >= rows) return;
  const Element* source = from.base + row * from.frame;
  const int64_t ahead = row + 2 < rows ? 2 * from.frame : 0;
  to += row * row_width;
  for (int64_t h = 0; h < heads; h++, source += from.head, to += head_width) {
    for (int64_t d = 0; d < head_dim; d += int64_t(64 / sizeof(Element))) __builtin_prefetch(source + ahead + d);
    int64_t d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) store(to + d, load(source + d));
    if (d < head_dim) store(to + d, load_part(source + d, head_dim - d));
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
  for (; j + R <= keys; j += R)
    score_rows<R, N>(k + j * k_width, k_width, q, head_dim, scores + j * width, peak);
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
  int64_t keys, head_dim, head_width, row_width;  // head_width: whole vectors; row_width: of a staged row
  float scale;
};

template <int N, class Element>
void panel(const Shape& shape, const Bias& bias, Stage stage, Scratch scratch, Element* out, int64_t stride, int64_t first_row,
           int64_t rows) {
  constexpr int64_t width = N * kLanes;
  pack_transposed(stage.q + first_row * shape.row_width, shape.row_width, rows, shape.head_width, scratch.q_panel, width);
  Floats peak[N], total[N];
  score<N>(stage.k, shape.row_width, scratch.q_panel, shape.head_dim, shape.keys, scratch.scores, peak);
  if (bias.table) regularise<N>(scratch.scores, shape.keys, bias, first_row, peak);
  exponentiate<N>(scratch.scores, shape.keys, shape.scale, peak, total);
  float totals[width];
  for (int n = 0; n < N; n++) store(totals + n * kLanes, total[n]);

  const Parts columns = {shape.head_width / kLanes};
  for (int64_t part = 0; part < columns.count(); part++) {
    const int64_t vectors = columns.size(part), d = columns.first(part) * kLanes;
    const auto run = vectors == 1 ? weigh<1, Element> : vectors == 2 ? weigh<2, Element>
                   : vectors == 3 ? weigh<(kMaxVectors > 2 ? 3 : 2), Element> : weigh<kMaxVectors, Element>;
    run(scratch.scores, width, stage.v + d, shape.row_width, shape.keys, totals, out + d, stride, rows, shape.head_dim - d);
  }
}

template <class Element>
void attend_head(const vstar_attention& a, const Shape& shape, const Bias& bias, Stage stage, Scratch scratch, Element* out) {
  const Parts rows = {(a.frames + kLanes - 1) / kLanes};
  for (int64_t part = 0; part < rows.count(); part++) {
    const int64_t vectors = rows.size(part), row = rows.first(part) * kLanes;
    const auto run = vectors == 1 ? panel<1, Element> : vectors == 2 ? panel<2, Element>
                   : vectors == 3 ? panel<(kMaxVectors > 2 ? 3 : 2), Element> : panel<kMaxVectors, Element>;
    const int64_t left = a.frames - row, stride = a.out_stride[1];
    run(shape, bias, stage, scratch, out + row * stride, stride, row, least(left, vectors * kLanes));
  }
}

template <class Element>
void attend(const vstar_attention& a, const Bias* biases, int64_t begin, int64_t end, Scratch scratch) {
  const int64_t head_width = vstar::round_up(a.head_dim, kLanes);
  const Shape shape = {a.keys, a.head_dim, head_width, scratch.row_width, float(kLog2E / __builtin_sqrt(double(a.head_dim)))};
  float* k = scratch.q_rows + a.frames * scratch.row_width;
  const Stage stage = {scratch.q_rows, k, k + a.keys * scratch.row_width};
  for (int64_t unit = begin, heads; unit < end; unit += heads) {
    heads = least(a.heads - unit % a.heads, least(end - unit, scratch.heads));
    const Rows<const Element> q(a.q, a.q_stride, a, unit), keys(a.k, a.k_stride, a, unit), v(a.v, a.v_stride, a, unit);
    for (int64_t row = 0; row < a.frames || row < a.keys; row++) {
      stage_row(q, row, a.frames, heads, a.head_dim, stage.q, head_width, scratch.row_width);
      stage_row(keys, row, a.keys, heads, a.head_dim, stage.k, head_width, scratch.row_width);
      stage_row(v, row, a.keys, heads, a.head_dim, stage.v, head_width, scratch.row_width);
    }
    const Bias& bias = biases[a.bias_batch == 1 ? 0 : unit / a.heads / a.positions];
    const Rows<Element> out(a.out, a.out_stride, a, unit);
    for (int64_t h = 0; h < heads; h++) {
      const int64_t d = h * head_width;
      attend_head(a, shape, bias, {stage.q + d, stage.k + d, stage.v + d}, scratch, out.base + h * out.head);
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
