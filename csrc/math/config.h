// What every formula header stands on: host and device code, one namespace per instruction set.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HQOD_HD __host__ __device__ __forceinline__
#else
#define HQOD_HD inline __attribute__((always_inline))
#endif
#ifdef __CUDA_ARCH__
#define HQOD_UNROLL _Pragma("unroll")
#define HQOD_ROLL _Pragma("unroll 1")
#else
#define HQOD_UNROLL
#define HQOD_ROLL
#endif

// Whether a * b + c can be rounded once, by an instruction.
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define HQOD_FUSES 1
#else
#define HQOD_FUSES 0
#endif

// The CPU kernels are compiled once per instruction set, headers included. The inline namespace
// keeps their functions apart, so that the linker never merges an AVX-512 body into the baseline.
#ifndef HQOD_ISA
#define HQOD_ISA portable
#endif

#define HQOD_MATH_BEGIN \
  namespace hqod {      \
  inline namespace HQOD_ISA {
#define HQOD_MATH_END \
  }                   \
  }

HQOD_MATH_BEGIN

template <typename To, typename From>
HQOD_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
#ifdef __CUDACC__
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
#else
  return __builtin_bit_cast(To, from);
#endif
}

HQOD_MATH_END
