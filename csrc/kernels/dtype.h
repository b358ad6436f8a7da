// The element types that the kernels know, and how one value of each is read and written. The
// formulas are compiled for float and double alone: half and bfloat16 are computed in float.
#pragma once

#include "math/config.h"

namespace hqod {

enum class Dtype { kFloat32 = 0, kFloat64 = 1, kBfloat16 = 2, kHalf = 3 };

}  // namespace hqod

HQOD_MATH_BEGIN

struct Bfloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

HQOD_HD float widen(float x) { return x; }
HQOD_HD double widen(double x) { return x; }
HQOD_HD void narrow(float x, float& out) { out = x; }
HQOD_HD void narrow(double x, double& out) { out = x; }

HQOD_HD float widen(Bfloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

HQOD_HD float widen(Half x) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  // Exponent and fraction moved into place, then 2^112 corrects the bias, subnormals included.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const float scaled = bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t finite = bit_cast<uint32_t>(scaled);
  const uint32_t special = magnitude | 0x7f800000u;  // infinity and NaN keep their fraction
  return bit_cast<float>(sign | (magnitude >= 0x0f800000u ? special : finite));
#endif
}

HQOD_HD void narrow(float x, Bfloat16& out) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // half to even
  out.bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
#endif
}

HQOD_HD void narrow(float x, Half& out) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t odd = (magnitude >> 13) & 1u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + odd) >> 13;  // half to even
  // Below 2^-14 the unit of a half is 2^-24: adding 0.5 leaves the code in the float's low bits.
  const float shifted = bit_cast<float>(magnitude) + 0.5f;
  const uint32_t subnormal = bit_cast<uint32_t>(shifted) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out.bits = static_cast<uint16_t>(sign | half);
#endif
}

// Element i of an array of a dtype as T; from a double it is rounded.
template <typename T>
HQOD_HD T read_one(Dtype dtype, const void* from, int64_t i) {
  switch (dtype) {
    case Dtype::kFloat32:
      return static_cast<T>(static_cast<const float*>(from)[i]);
    case Dtype::kFloat64:
      return static_cast<T>(static_cast<const double*>(from)[i]);
    case Dtype::kBfloat16:
      return static_cast<T>(widen(static_cast<const Bfloat16*>(from)[i]));
    default:
      return static_cast<T>(widen(static_cast<const Half*>(from)[i]));
  }
}

template <typename T>
HQOD_HD void write_one(Dtype dtype, void* to, int64_t i, T value) {
  switch (dtype) {
    case Dtype::kFloat32:
      static_cast<float*>(to)[i] = static_cast<float>(value);
      break;
    case Dtype::kFloat64:
      static_cast<double*>(to)[i] = static_cast<double>(value);
      break;
    case Dtype::kBfloat16:
      narrow(static_cast<float>(value), static_cast<Bfloat16*>(to)[i]);
      break;
    default:
      narrow(static_cast<float>(value), static_cast<Half*>(to)[i]);
  }
}

// Calls f with a value of the type that a dtype is computed in.
template <typename F>
void with_compute_type(Dtype dtype, F&& f) {
  if (dtype == Dtype::kFloat64) return f(double{});
  f(float{});
}

HQOD_MATH_END
