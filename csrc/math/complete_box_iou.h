// Complete IoU loss of two boxes, and its slopes: the distance IoU loss and
//
//   alpha v,  v = (2 / pi (atan(w2 / h2) - atan(w1 / h1)))^2,  alpha = v / (1 - iou + v + eps)
//
// alpha is a constant. The derivative of an angle is h / max(w^2 + h^2, eps) in w, and an empty box
// has the angle 0.
//
// Source: CIoU (arXiv:1911.08287, arXiv:2005.03572), with the eps of torchvision.
#pragma once

#include "math/box_pair.h"

HQOD_MATH_BEGIN

// atan(w / h), in float 1e-7, for w and h of at least 0, -0 among them.
HQOD_HD double angle_of(double w, double h) { return ::atan2(magnitude(w), magnitude(h)); }

HQOD_HD float angle_of(float w, float h) {
#ifdef __CUDA_ARCH__
  return ::atan2f(magnitude(w), magnitude(h));
#else
  const bool wide = w > h;
  const float low = wide ? h : w, high = wide ? w : h;
  const float r = low / at_least(high, 1e-37f), z = r * r;
  float p = 0.00292068091f;
  p = mul_add(p, z, -0.0163678825f);
  p = mul_add(p, z, 0.0432117879f);
  p = mul_add(p, z, -0.0755220801f);
  p = mul_add(p, z, 0.106660016f);
  p = mul_add(p, z, -0.142110541f);
  p = mul_add(p, z, 0.199937731f);
  p = mul_add(p, z, -0.333331525f);
  const float angle = mul_add(p * z, r, r);
  return wide ? 1.57079637f - angle : angle;
#endif
}

struct CompleteBoxIoU {
  template <typename T>
  static HQOD_HD PairLoss<T> of(const BoxPair<T>& p) {
    PairLoss<T> out = iou_part(p);
    add_distance(p, out);
    const T factor = T(0.40528473456935109);  // 4 / pi^2
    const T turn = angle_of(p.w2, p.h2) - angle_of(p.w1, p.h1), v = factor * turn * turn;
    const T alpha = v / ((T(1) - p.iou) + v + p.eps);
    out.loss += alpha * v;
    const T slope = T(2) * alpha * factor * turn;
    const T first = slope / at_least(p.w1 * p.w1 + p.h1 * p.h1, p.eps);
    const T second = slope / at_least(p.w2 * p.w2 + p.h2 * p.h2, p.eps);
    out.slope.w1 = -first * p.h1;
    out.slope.h1 = first * p.w1;
    out.slope.w2 = second * p.h2;
    out.slope.h2 = -second * p.w2;
    return settled(p, out);
  }
};

HQOD_MATH_END
