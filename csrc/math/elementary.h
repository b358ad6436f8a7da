// exp, log, rounding and clamping, in a form that compilers turn into vector code.
//
// Branch-free and without table look-ups, so a loop over them vectorises. Float polynomials were
// fitted to their interval by reweighted least squares; the errors named are relative.
#pragma once

#include "math/config.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include <cmath>
#endif

HQOD_MATH_BEGIN

// a * b + c, rounded once where the machine can. Everywhere else a product is rounded: compilers
// are told not to fuse, so that IoU is exactly symmetric and exactly 1 for equal boxes.
HQOD_HD float mul_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#elif HQOD_FUSES
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

HQOD_HD double mul_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#elif HQOD_FUSES
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// n * s - x for a whole number n, as if rounded once, where the two are near each other: what a
// rounded product would leave of the difference is mostly its rounding.
HQOD_HD float less_than_multiple(float x, float n, float s) {
#if HQOD_FUSES
  return mul_add(n, s, -x);
#else
  return static_cast<float>(static_cast<double>(n) * s - x);
#endif
}

HQOD_HD double less_than_multiple(double x, double n, double s) {
#if HQOD_FUSES
  return mul_add(n, s, -x);
#else  // the halves of s have 26 and 27 bits: their products are exact for n of as many
  const double high = bit_cast<double>(bit_cast<uint64_t>(s) & ~uint64_t{0x7ffffff});
  return (n * high - x) + n * (s - high);
#endif
}

// The same for |n| <= 2^12: the halves of s have 12 bits each, and their products are exact.
HQOD_HD float less_than_short_multiple(float x, float n, float s) {
#if HQOD_FUSES
  return mul_add(n, s, -x);
#else
  const float high = bit_cast<float>(bit_cast<uint32_t>(s) & ~uint32_t{0xfff});
  return (n * high - x) + n * (s - high);
#endif
}

HQOD_HD double less_than_short_multiple(double x, double n, double s) {
  return less_than_multiple(x, n, s);
}

HQOD_HD float magnitude(float x) { return __builtin_fabsf(x); }
HQOD_HD double magnitude(double x) { return __builtin_fabs(x); }

// The greater and the lesser of two, NaN where one is. A GPU's instructions take +0 for greater
// than -0, elsewhere x stays as it is where the two are equal.
template <typename T>
HQOD_HD T max_nan(T x, T low) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (sizeof(T) == 4) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(low));
    return x;
  }
#endif
  return x < low ? low : x;
}

template <typename T>
HQOD_HD T min_nan(T x, T high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (sizeof(T) == 4) {
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(high));
    return x;
  }
#endif
  return x > high ? high : x;
}

template <typename T>
HQOD_HD T clamp_nan(T x, T low, T high) {  // NaN stays NaN; bounds are none
  return min_nan(max_nan(x, low), high);   // one after the other: a max and a min instruction
}

// The same for an upper bound that may be NaN, which holds nothing.
template <typename T>
HQOD_HD T clamp_open(T x, T low, T high) {
  x = max_nan(x, low);
  return x > high ? high : x;
}

// a < b or a > b: false for NaN.
template <typename T>
HQOD_HD bool differ(T a, T b) {
#ifdef __CUDA_ARCH__
  return (a < b) | (a > b);
#else
  return __builtin_islessgreater(a, b);
#endif
}

template <typename T>
HQOD_HD T at_least(T x, T low) {  // NaN stays NaN
  return x < low ? low : x;
}

// x / s, rounded as a division rounds, for a divisor that many values share: one multiplication,
// and one correction by the exact remainder (Markstein). Wants 2^-100 <= |s| <= 2^100, and inverse
// = 1/s. Where the quotient overflows there is no remainder (inf - inf), and the first one stands.
template <typename T>
HQOD_HD T quotient(T x, T s, T inverse) {
#if HQOD_FUSES
  const T q = x * inverse;
  const T corrected = mul_add(mul_add(-q, s, x), inverse, q);
  return corrected == corrected ? corrected : q;
#else
  (void)inverse;
  return x / s;
#endif
}

template <typename T>
HQOD_HD bool quotient_works(T s) {
  return magnitude(s) >= T(0x1p-100) && magnitude(s) <= T(0x1p100);
}

HQOD_HD double exp_within(double x) { return ::exp(x); }
HQOD_HD double exp_of(double x) { return ::exp(x); }
HQOD_HD double log_of(double x) { return ::log(x); }

// exp(x), 1e-7, for -87 <= x <= 88. NaN stays NaN.
HQOD_HD float exp_within(float x) {
#ifdef __CUDA_ARCH__
  return ::expf(x);
#else
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = mul_add(x, 1.44269504f, magic);
  const float n = shifted - magic;
  const float r = mul_add(n, -1.42860677e-06f, mul_add(n, -0.693145752f, x));  // ln 2 in two parts
  float p = 0.00138146f;
  p = mul_add(p, r, 0.00836871564f);
  p = mul_add(p, r, 0.041668389f);
  p = mul_add(p, r, 0.166665211f);
  p = mul_add(p, r, 0.49999994f);
  p = mul_add(p, r * r, r) + 1.0f;
  const uint32_t bits = (bit_cast<uint32_t>(shifted) + 127u) << 23;
  return p * bit_cast<float>(bits);
#endif
}

// exp(x), 1e-7, for x <= 88; below -87 it stays at exp(-87), a normal number. NaN stays NaN.
HQOD_HD float exp_of(float x) {
#ifdef __CUDA_ARCH__
  return ::expf(x);
#else
  return exp_within(clamp_nan(x, -87.0f, 88.0f));
#endif
}

// log(x), 1e-7, for positive normal x. NaN stays NaN.
HQOD_HD float log_of(float x) {
#ifdef __CUDA_ARCH__
  return ::logf(x);
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const int32_t e = static_cast<int32_t>(bits - 0x3f2aaaabu) >> 23;  // mantissa in [2/3, 4/3)
  const float m = bit_cast<float>(bits - (static_cast<uint32_t>(e) << 23));
  const float f = m - 1.0f, ef = static_cast<float>(e), f2 = f * f;
  float p = -0.128936529f;
  p = mul_add(p, f, 0.139864802f);
  p = mul_add(p, f, -0.12183854f);
  p = mul_add(p, f, 0.140054896f);
  p = mul_add(p, f, -0.166805133f);
  p = mul_add(p, f, 0.200104266f);
  p = mul_add(p, f, -0.249997973f);
  p = mul_add(p, f, 0.333332151f);
  const float tail = mul_add(p * f2, f, mul_add(ef, 1.42860677e-06f, -0.5f * f2));
  return mul_add(ef, 0.693145752f, x - x) + (f + tail);  // x - x carries NaN
#endif
}

template <typename T>
struct Sigmoid {
  T value, slope;  // slope = value * (1 - value), without cancellation
};

template <typename T>
HQOD_HD Sigmoid<T> sigmoid(T z) {
  const T t = exp_of(z < 0 ? z : -z);
  const T inverse = T(1) / (T(1) + t);
  return {z < 0 ? t * inverse : inverse, t * inverse * inverse};
}

// Round half to even.
HQOD_HD double round_even(double x) { return ::rint(x); }

HQOD_HD float round_even(float x) {
#if defined(__CUDA_ARCH__) || defined(__SSE4_1__) || !defined(__SSE2__)
  return ::rintf(x);
#else  // plain SSE2 has no rounding instruction: 2^23 pushes the fraction out
  const float magnitude = __builtin_fabsf(x), big = 8388608.0f;
  const float rounded = __builtin_copysignf((magnitude + big) - big, x);
  return magnitude < big ? rounded : x;
#endif
}

HQOD_MATH_END
