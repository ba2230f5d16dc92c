// GELU and SiLU of a vector.
#pragma once
#include "vectors.h"

namespace {

constexpr double kLog2E = 1.4426950408889634;
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// x * Phi(x). Of the two tails of the normal distribution the small one is computed, so that nothing cancels:
// Phi(-|x|) = exp(-x^2 / 2) * t * P(t) with t = 1 / (1 + 0.35 |x|), P fitted to a relative error below 4e-8.
inline Floats gelu(Floats x) {
  const Floats size = x < Floats{} ? -x : x;
  const Floats t = fill(1.0f) / (fill(1.0f) + fill(0.35f) * size);
  Floats p = fill(-0.0295525694f);
  p = p * t + fill(0.145892507f);
  p = p * t + fill(-0.259547650f);
  p = p * t + fill(0.163379195f);
  p = p * t + fill(-0.0258708352f);
  p = p * t + fill(0.106614000f);
  p = p * t + fill(0.119570151f);
  p = p * t + fill(0.139895557f);
  p = p * t + fill(0.139619625f);
  const Floats tail = size * t * p * exp2(size * size * fill(float(-kLog2E / 2)));
  // below 2^-126 the exponential stays there; the product with a size that large is lost beside it
  return (x < Floats{} ? Floats{} : x) - (size > fill(13.0f) ? Floats{} : tail);
}

inline Floats silu(Floats x) {
  const Floats e = exp2((x < Floats{} ? x : -x) * fill(float(kLog2E)));
  return x * ((x < Floats{} ? e : fill(1.0f)) / (fill(1.0f) + e));
}

}  // namespace
