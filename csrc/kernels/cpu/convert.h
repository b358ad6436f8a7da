// Loads and stores of every dtype through buffers of the compute type: float for half and bfloat16.
// The formulas are thus compiled for float and double alone.
#pragma once

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "kernels/dtype.h"
#include "math/config.h"

HQOD_MATH_BEGIN

struct Bfloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

HQOD_HD float widen(Bfloat16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}

HQOD_HD float widen(Half x) {
  // Exponent and fraction moved into place, then 2^112 corrects the bias, subnormals included.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const float scaled = __builtin_bit_cast(float, magnitude) * 0x1p112f;
  const uint32_t finite = __builtin_bit_cast(uint32_t, scaled);
  const uint32_t special = magnitude | 0x7f800000u;  // infinity and NaN keep their fraction
  return __builtin_bit_cast(float, sign | (magnitude >= 0x0f800000u ? special : finite));
}

HQOD_HD void narrow(float x, Bfloat16& out) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // half to even
  out.bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

HQOD_HD void narrow(float x, Half& out) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t odd = (magnitude >> 13) & 1u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + odd) >> 13;  // half to even
  // Below 2^-14 the unit of a half is 2^-24: adding 0.5 leaves the code in the float's low bits.
  const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
  const uint32_t subnormal = __builtin_bit_cast(uint32_t, shifted) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out.bits = static_cast<uint16_t>(sign | half);
}

HQOD_HD void load(const Bfloat16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}

HQOD_HD void load(const Half* from, float* to, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(half));
  }
#endif
  for (; i < n; ++i) to[i] = widen(from[i]);
}

HQOD_HD void store(const float* from, Bfloat16* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) narrow(from[i], to[i]);
}

HQOD_HD void store(const float* from, Half* to, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
  }
#endif
  for (; i < n; ++i) narrow(from[i], to[i]);
}

// n elements of a dtype from index start on, as T: in place when they are that already, else in the
// buffer.
template <typename T>
__attribute__((noinline)) const T* read(Dtype dtype, const void* from, int64_t start, int64_t n,
                                        T* buffer) {
  if constexpr (sizeof(T) == 4) {
    if (dtype == Dtype::kBfloat16) {
      load(static_cast<const Bfloat16*>(from) + start, buffer, n);
      return buffer;
    }
    if (dtype == Dtype::kHalf) {
      load(static_cast<const Half*>(from) + start, buffer, n);
      return buffer;
    }
  }
  return static_cast<const T*>(from) + start;
}

// Where n results go that write() then brings to their place: that place itself, or the buffer.
template <typename T>
HQOD_HD T* write_target(Dtype dtype, void* to, int64_t start, T* buffer) {
  const bool direct = dtype == Dtype::kFloat32 || dtype == Dtype::kFloat64;
  return direct ? static_cast<T*>(to) + start : buffer;
}

template <typename T>
__attribute__((noinline)) void write(Dtype dtype, const T* buffer, void* to, int64_t start,
                                     int64_t n) {
  if constexpr (sizeof(T) == 4) {
    if (dtype == Dtype::kBfloat16) store(buffer, static_cast<Bfloat16*>(to) + start, n);
    if (dtype == Dtype::kHalf) store(buffer, static_cast<Half*>(to) + start, n);
  }
}

// Calls f with a value of the type that a dtype is computed in.
template <typename F>
HQOD_HD void with_compute_type(Dtype dtype, F&& f) {
  if (dtype == Dtype::kFloat64) return f(double{});
  f(float{});
}

HQOD_MATH_END
