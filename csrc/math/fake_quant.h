// Fake quantization of one value, and its straight-through gradient.
//
//   c = round(x / s) + round(z),  q = clamp(c, q_min, q_max),  y = (q - round(z)) s
//   q_min <= c <= q_max:  dx = dy, ds = (q - round(z) - x / s) dy, dz = 0
//   otherwise:            dx = 0,  ds = (q - round(z)) dy,         dz = -s dy
//
// Half to even, a true division as in ONNX. A NaN counts as inside, so that it reaches every
// gradient. The callers pass z rounded.
//
// Source: LSQ (arXiv:1902.08153), LSQ+ (arXiv:2004.09576).
#pragma once

#include "math/elementary.h"

HQOD_MATH_BEGIN

template <typename T>
HQOD_HD T fake_quant(T x, T s, T z, T q_min, T q_max) {
  return (clamp_nan(round_even(x / s) + z, q_min, q_max) - z) * s;
}

template <typename T>
struct FakeQuantGrad {
  T dx, ds, dz;
};

template <typename T>
HQOD_HD FakeQuantGrad<T> fake_quant_grad(T x, T s, T z, T q_min, T q_max, T dy) {
  const T ratio = x / s;
  const T code = round_even(ratio) + z;
  const bool outside = (code < q_min) | (code > q_max);
  const T level = clamp_nan(code, q_min, q_max) - z;
  return {outside ? T(0) : dy, dy * (outside ? level : level - ratio), outside ? -s * dy : T(0)};
}

HQOD_MATH_END
