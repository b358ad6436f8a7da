// Loads and stores of every dtype through buffers of the compute type.
#pragma once

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "kernels/dtype.h"

HQOD_MATH_BEGIN

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

// The same, always into the buffer.
template <typename T>
HQOD_HD void copy(Dtype dtype, const void* from, int64_t start, int64_t n, T* buffer) {
  const T* values = read(dtype, from, start, n, buffer);
  if (values == buffer) return;
  for (int64_t i = 0; i < n; ++i) buffer[i] = values[i];
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

HQOD_MATH_END
