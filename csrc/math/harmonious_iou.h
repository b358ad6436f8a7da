// Harmonious IoU loss of a box, and its slope.
//
//   L = alpha (1 - u) (1 + u)^gamma
//   dL/du = -alpha (1 + u)^(gamma - 1) ((1 - gamma) + (1 + gamma) u)
//
// Source: HQOD, after HarDet (arXiv:2108.10809).
#pragma once

#include "math/elementary.h"

HQOD_MATH_BEGIN

template <typename T>
struct HarmoniousIoU {
  T loss, slope;
};

template <typename T>
HQOD_HD HarmoniousIoU<T> harmonious_iou(T u, T alpha, T gamma) {
  const T base = T(1) + u;
  const T slope = alpha * exp_of((gamma - T(1)) * log_of(base));  // alpha (1 + u)^(gamma - 1)
  return {(T(1) - u) * base * slope, -slope * ((T(1) - gamma) + (T(1) + gamma) * u)};
}

HQOD_MATH_END
