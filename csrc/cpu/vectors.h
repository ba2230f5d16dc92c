// One vector of floats in GCC/Clang vector extensions, as wide as the object's instruction set: no intrinsics, no exports.
#pragma once
#include <cstdint>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define VECTOR_BYTES 16
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#endif

namespace {

constexpr int kLanes = VECTOR_BYTES / 4;
typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Ints){__VA_ARGS__})
#endif

inline Floats fill(float x) { return x - Floats{}; }
inline Words fill_bits(uint32_t x) { return x - Words{}; }
// keeps b where either is NaN
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline Floats load(const float* p) {
  Floats x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

inline Words load_bits(const void* p) {
  Halves x;
  __builtin_memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, Words);
}

inline Floats load(const BFloat16* p) { return (Floats)(load_bits(p) << 16); }

inline Floats load(const Float16* p) {
  const Words half = load_bits(p), infinity = fill_bits(0x7f800000u);
  // the exponent moves from bias 15 to 127 by a multiplication, which also normalises subnormal halves
  const Words magnitude = (Words)((Floats)((half & 0x7fffu) << 13) * fill(0x1p112f));
  const Words special = (Words)((half & 0x7c00u) == fill_bits(0x7c00u)) & infinity;
  return (Floats)(magnitude | special | ((half & 0x8000u) << 16));
}

inline void store(float* p, Floats x) { __builtin_memcpy(p, &x, sizeof x); }

inline void store_bits(void* p, Words x) {
  const Halves half = __builtin_convertvector(x, Halves);
  __builtin_memcpy(p, &half, sizeof half);
}

inline Words choose(Ints condition, Words yes, Words no) { return ((Words)condition & yes) | (~(Words)condition & no); }

inline void store(BFloat16* p, Floats x) {
  const Words bits = (Words)x, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  store_bits(p, choose(x != x, fill_bits(0x7fc0u), rounded));
}

inline void store(Float16* p, Floats x) {
  const Words bits = (Words)x, magnitude = bits & 0x7fffffffu;
  const Floats size = (Floats)magnitude;
  const Words normal = (magnitude - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  // adding 0.5 rounds at the subnormal halves' spacing, 2^-24
  const Words subnormal = (Words)(size + fill(0.5f)) - 0x3f000000u;
  Words half = choose(size < fill(0x1p-14f), subnormal, normal);
  half = choose(size >= fill(65520.0f), fill_bits(0x7c00u), half);
  half = choose(x != x, fill_bits(0x7e00u), half);
  store_bits(p, half | ((bits >> 16) & 0x8000u));
}

// The first `count` elements, zeros after them.
template <class Element>
inline Floats load_part(const Element* p, int64_t count) {
  Element whole[kLanes] = {};
  __builtin_memcpy(whole, p, count * sizeof(Element));
  return load(whole);
}

template <class Element>
inline void store_part(Element* p, Floats x, int64_t count) {
  Element whole[kLanes];
  store(whole, x);
  __builtin_memcpy(p, whole, count * sizeof(Element));
}

// 2^x for x up to about 0, NaN for NaN: relative error below 3e-7, and 2^-126 for anything smaller.
inline Floats exp2(Floats x) {
  const Floats shift = fill(0x1.8p23f);
  x = larger(fill(-126.0f), x);
  const Floats whole = x + shift, f = x - (whole - shift);
  Floats p = fill(1.5403530e-4f);
  p = p * f + fill(1.33335581e-3f);
  p = p * f + fill(9.61812911e-3f);
  p = p * f + fill(5.55041087e-2f);
  p = p * f + fill(2.40226507e-1f);
  p = p * f + fill(6.93147181e-1f);
  p = p * f + fill(1.0f);
  // the low bits of `whole` are the rounded exponent; a product, not an integer sum, so that NaN stays NaN
  return p * (Floats)(((Words)whole + 127u) << 23);
}

// rows[i][j] <-> rows[j][i], by log2(kLanes) rounds of interleaving
inline void transpose(Floats (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int round = kLanes; round > 1; round /= 2) {
    Floats next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; i++) {
      next[2 * i] = SHUFFLE(rows[i], rows[i + kLanes / 2], LOW);
      next[2 * i + 1] = SHUFFLE(rows[i], rows[i + kLanes / 2], HIGH);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) rows[i] = next[i];
  }
}

}  // namespace
