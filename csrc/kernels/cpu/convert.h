// Loads and stores of every dtype through buffers of the compute type: float for half and bfloat16.
#pragma once

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "math/config.h"

HQOD_MATH_BEGIN

struct Bfloat16 {
  using Compute = float;
  uint16_t bits;
};

struct Half {
  using Compute = float;
  uint16_t bits;
};

template <typename T>
struct ComputeOf {
  using type = typename T::Compute;
};
template <>
struct ComputeOf<float> {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeOf<T>::type;

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

template <typename T>
HQOD_HD void load(const T* from, Compute<T>* to, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  if constexpr (__is_same(T, Half)) {
    for (; i + 8 <= n; i += 8) {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(half));
    }
  }
#endif
  for (; i < n; ++i) {
    if constexpr (__is_same(T, Compute<T>)) {
      to[i] = from[i];
    } else {
      to[i] = widen(from[i]);
    }
  }
}

template <typename T>
HQOD_HD void store(const Compute<T>* from, T* to, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  if constexpr (__is_same(T, Half)) {
    for (; i + 8 <= n; i += 8) {
      const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
    }
  }
#endif
  for (; i < n; ++i) {
    if constexpr (__is_same(T, Compute<T>)) {
      to[i] = from[i];
    } else {
      narrow(from[i], to[i]);
    }
  }
}

HQOD_MATH_END
