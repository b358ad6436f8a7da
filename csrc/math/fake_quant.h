// Fake quantization of one value, and its straight-through gradient.
//
//   c = round(x / s) + round(z),  q = clamp(c, q_min, q_max),  y = (q - round(z)) s
//   q_min <= c <= q_max:  dx = dy, ds = (q - round(z) - x / s) dy, dz = 0
//   otherwise:            dx = 0,  ds = (q - round(z)) dy,         dz = -s dy
//
// Half to even, a true division as in ONNX. A NaN counts as inside, so that it reaches every
// gradient. All codes are counted from the zero point, whose rounded value is thus part of the
// range.
//
// An activation that comes before it (ReLU, ReLU6) holds x to an interval, and passes dx inside it
// alone. Everything else is as for the value so held.
//
// Source: LSQ (arXiv:1902.08153), LSQ+ (arXiv:2004.09576).
#pragma once

#include <type_traits>

#include "math/elementary.h"

HQOD_MATH_BEGIN

enum class Activation { kNone = 0, kRelu = 1, kRelu6 = 2 };

// A scale with the range of its codes, and the interval that an activation holds x to.
template <typename T>
struct QuantScale {
  T scale, inverse;
  T low, high;      // q_min - round(z), q_max - round(z)
  T x_low, x_high;  // NaN, which holds nothing, without an activation
};

// From 1 / scale and the rounded zero point. A zero point that is NaN makes the scale NaN: its
// range alone would be open, and let values through.
template <typename T>
HQOD_HD QuantScale<T> quant_scale(T scale, T inverse, T zero, T q_min, T q_max,
                                  Activation activation) {
  const T open = static_cast<T>(__builtin_nan(""));
  return {zero == zero ? scale : zero,
          inverse,
          q_min - zero,
          q_max - zero,
          activation == Activation::kNone ? open : T(0),
          activation == Activation::kRelu6 ? T(6) : open};
}

// How x / s is computed: by the inverse, where quotient_works(s), or by a division.
enum class Ratio { kInverse, kDivided };

template <Ratio ratio, typename T>
HQOD_HD T quant_ratio(T x, const QuantScale<T>& s) {
  if constexpr (ratio == Ratio::kInverse) {
    return quotient(x, s.scale, s.inverse);
  } else {
    return x / s.scale;
  }
}

// `clipped` when an activation comes first.
template <Ratio kind, bool clipped, typename T>
HQOD_HD T fake_quant(T x, const QuantScale<T>& s) {
  if constexpr (clipped) x = clamp_open(x, s.x_low, s.x_high);
  return clamp_nan(round_even(quant_ratio<kind>(x, s)), s.low, s.high) * s.scale;
}

// How near to a tie x * (1 / s) must be for its code to differ from that of x / s, where neither is
// clamped: the two differ by 3 roundings, of 2^-24 of their size each, and this is 4. Wants
// quotient_works(s).
template <typename T>
HQOD_HD T tie_margin(const QuantScale<T>& s) {
  const T low = magnitude(s.low), high = magnitude(s.high);
  return ((low > high ? low : high) + 1) * (sizeof(T) == 4 ? T(0x1p-22) : T(0x1p-51));
}

template <typename T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

// What `doubt` has set after a value whose code might be another one. A sum that reaches 1 changes
// the last bit of its exponent, so that a whole block is tested at once.
template <typename T>
inline constexpr Bits<T> kDoubt = Bits<T>(1) << (sizeof(T) == 4 ? 23 : 52);

// fake_quant with one product for the quotient. Not sure near a tie, or of a NaN: then says so.
template <bool clipped, typename T>
HQOD_HD T fake_quant_guess(T x, const QuantScale<T>& s, T margin, Bits<T>& doubt) {
  if constexpr (clipped) x = clamp_open(x, s.x_low, s.x_high);
  const T ratio = x * s.inverse;
  const T code = round_even(ratio);
  const T rest = ratio - code;
  doubt |= bit_cast<Bits<T>>(magnitude(rest) + (T(0.5) + margin));
  return clamp_nan(code, s.low, s.high) * s.scale;
}

// level - x / s of a value inside the range, so one half at most. Not by the rounded quotient,
// whose error grows with the code.
template <Ratio kind, typename T>
HQOD_HD T rounding_error(T x, T level, const QuantScale<T>& s) {
  const T rest = less_than_multiple(x, level, s.scale);
  return kind == Ratio::kInverse ? rest * s.inverse : rest / s.scale;
}

// What the parameters' gradients come in: as they are, or what a sum over one scale leaves to its
// end, the slope times the scale and dz over -scale. That is less work a value, and wants
// slopes_scale(s).
enum class Slope { kPlain, kTimesScale };

// Not so small or large that a slope times the scale and the gradient leaves the range of T; and
// where products are not fused, codes short enough for less_than_short_multiple.
template <typename T>
HQOD_HD bool slopes_scale(const QuantScale<T>& s) {
  const bool usual = magnitude(s.scale) >= T(0x1p-40) && magnitude(s.scale) <= T(0x1p40);
  const bool fits = HQOD_FUSES || sizeof(T) == 8;
  return usual && (fits || (magnitude(s.low) <= T(4096) && magnitude(s.high) <= T(4096)));
}

template <typename T>
struct FakeQuantGrad {
  T dx, slope, dz;  // ds is slope dy: left to the sum that it goes into, for one fused step
};

template <Ratio kind, bool clipped, Slope form = Slope::kPlain, typename T>
HQOD_HD FakeQuantGrad<T> fake_quant_grad(T x, const QuantScale<T>& s, T dy) {
  bool stopped = false;
  if constexpr (clipped) {
    stopped = (x <= s.x_low) | (x >= s.x_high);
    x = clamp_open(x, s.x_low, s.x_high);
  }
  const T code = round_even(quant_ratio<kind>(x, s));
  const T level = clamp_nan(code, s.low, s.high);
  const bool outside = differ(code, level);
  const T dx = outside | stopped ? T(0) : dy;
  if constexpr (form == Slope::kTimesScale) {
    const T slope = less_than_short_multiple(outside ? T(0) : x, level, s.scale);
    return {dx, slope, outside ? dy : T(0)};
  } else {
    const T slope = outside ? level : rounding_error<kind>(x, level, s);
    return {dx, slope, outside ? -s.scale * dy : T(0)};
  }
}

HQOD_MATH_END
