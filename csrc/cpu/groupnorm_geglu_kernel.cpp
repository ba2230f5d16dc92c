// GEGLU, and the two sweeps of a group norm with SiLU, in whatever instruction set this object is compiled for.
#include "activations.h"
#include "groupnorm_geglu.h"

namespace {

using vstar::Moments;

template <class Element>
void geglu(const vstar_geglu_arguments& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const Element* value = (const Element*)a.x + row * 2 * a.inner;
    const Element* gate = value + a.inner;
    Element* out = (Element*)a.out + row * a.inner;
    int64_t i = 0;
    for (; i + kLanes <= a.inner; i += kLanes) store(out + i, load(value + i) * gelu(load(gate + i)));
    if (i < a.inner)
      store_part(out + i, load_part(value + i, a.inner - i) * gelu(load_part(gate + i, a.inner - i)), a.inner - i);
  }
}

template <class Element>
inline Floats load_some(const Element* p, int64_t count) {
  return count >= kLanes ? load(p) : load_part(p, count);
}

// Rows that are read twice while they lie in the first-level cache.
constexpr int64_t kChunkFloats = 4096;

// Two passes over each chunk, E[x] and then E[(x - E[x])^2]: the difference of squares would cancel. Chunks are joined by
// the formula of Chan, Golub and LeVeque.
template <class Element>
void measure(const vstar_groupnorm_silu_arguments& a, int64_t item, int64_t begin, int64_t end, float* scratch, Moments* groups) {
  const int64_t channels = a.channels, width = vstar::round_up(channels, vstar::kMaxLanes);
  float *mean = scratch, *squares = mean + width, *sum = squares + width, *spread = sum + width;
  for (int64_t c = 0; c < width; c += kLanes) store(mean + c, Floats{}), store(squares + c, Floats{});
  const int64_t chunk = kChunkFloats / channels > 8 ? kChunkFloats / channels : 8;
  for (int64_t first = begin; first < end; first += chunk) {
    const int64_t count = least(chunk, end - first), before = first - begin;
    const Element* rows = (const Element*)a.x + (item * a.rows + first) * channels;
    for (int64_t c = 0; c < width; c += kLanes) store(sum + c, Floats{}), store(spread + c, Floats{});
    for (int64_t r = 0; r < count; r++)
      for (int64_t c = 0; c < channels; c += kLanes)
        store(sum + c, load(sum + c) + load_some(rows + r * channels + c, channels - c));
    for (int64_t c = 0; c < channels; c += kLanes) store(sum + c, load(sum + c) * fill(1.0f / float(count)));
    for (int64_t r = 0; r < count; r++)
      for (int64_t c = 0; c < channels; c += kLanes) {
        const Floats off = load_some(rows + r * channels + c, channels - c) - load(sum + c);
        store(spread + c, load(spread + c) + off * off);
      }
    const Floats share = fill(float(count) / float(before + count)), weight = fill(float(before)) * share;
    for (int64_t c = 0; c < channels; c += kLanes) {
      const Floats off = load(sum + c) - load(mean + c);
      store(mean + c, load(mean + c) + off * share);
      store(squares + c, load(squares + c) + load(spread + c) + off * off * weight);
    }
  }
  const int64_t size = channels / a.groups;
  for (int64_t g = 0; g < a.groups; g++) {
    double middle = 0, total = 0;
    for (int64_t c = g * size; c < (g + 1) * size; c++) middle += mean[c] / double(size);
    for (int64_t c = g * size; c < (g + 1) * size; c++)
      total += squares[c] + double(end - begin) * (mean[c] - middle) * (mean[c] - middle);
    groups[g] = {middle, total};
  }
}

template <bool Silu, class Element>
void normalise_rows(const Element* x, Element* out, int64_t rows, int64_t channels, const float* gain, const float* shift) {
  for (int64_t r = 0; r < rows; r++, x += channels, out += channels) {
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) {
      const Floats y = load(x + c) * load(gain + c) + load(shift + c);
      store(out + c, Silu ? silu(y) : y);
    }
    if (c < channels) {
      const Floats y = load_part(x + c, channels - c) * load(gain + c) + load(shift + c);
      store_part(out + c, Silu ? silu(y) : y, channels - c);
    }
  }
}

template <class Element>
void normalise(const vstar_groupnorm_silu_arguments& a, int64_t item, int64_t begin, int64_t end, const float* gain,
               const float* shift) {
  const int64_t at = (item * a.rows + begin) * a.channels;
  const auto run = a.silu ? normalise_rows<true, Element> : normalise_rows<false, Element>;
  run((const Element*)a.x + at, (Element*)a.out + at, end - begin, a.channels, gain, shift);
}

}  // namespace

namespace vstar {

void VSTAR_GEGLU(const vstar_geglu_arguments& a, int64_t begin, int64_t end) {
  const auto run = a.dtype == VSTAR_FLOAT32 ? geglu<float> : a.dtype == VSTAR_BFLOAT16 ? geglu<BFloat16> : geglu<Float16>;
  run(a, begin, end);
}

void VSTAR_MEASURE(const vstar_groupnorm_silu_arguments& a, int64_t item, int64_t begin, int64_t end, float* scratch,
                   Moments* groups) {
  const auto run = a.dtype == VSTAR_FLOAT32 ? measure<float> : a.dtype == VSTAR_BFLOAT16 ? measure<BFloat16> : measure<Float16>;
  run(a, item, begin, end, scratch, groups);
}

void VSTAR_NORMALISE(const vstar_groupnorm_silu_arguments& a, int64_t item, int64_t begin, int64_t end, const float* gain,
                     const float* shift) {
  const auto run = a.dtype == VSTAR_FLOAT32    ? normalise<float>
                   : a.dtype == VSTAR_BFLOAT16 ? normalise<BFloat16>
                                               : normalise<Float16>;
  run(a, item, begin, end, gain, shift);
}

}  // namespace vstar
