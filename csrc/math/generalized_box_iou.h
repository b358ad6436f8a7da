// Generalized IoU loss of two boxes, and its gradient.
//
//   L = 1 - iou + (C - U) / (C + eps),  iou = I / (U + eps)
//     = (1 - iou) + (1 - r),            r = (U + eps) / (C + eps)
//
// with the areas I of the intersection, U of the union, C of the smallest box around both; sides
// are clamped at 0. The second form is what torchvision computes, without the difference C - U.
//
// Source: GIoU (arXiv:1902.09630), with the eps of torchvision. Boxes that lie in one with a side
// above 2^60 are scaled as in box_iou.h, with 1e-30 for eps.
#pragma once

#include "math/box_iou.h"

HQOD_MATH_BEGIN

template <typename T>
struct GeneralizedBoxIoU {
  T loss;
  T shrink;                   // factor of the sides
  T d_inter, d_area, d_hull;  // slopes in I, in the area of either box, in C; shrink once more
};

template <typename T>
HQOD_HD GeneralizedBoxIoU<T> generalized_box_iou(const Box<T>& a, const Box<T>& b, T eps) {
  const Hull<T> hull = hull_of(a, b);
  const T longest = hull.w > hull.h ? hull.w : hull.h;
  const Scaling<T> by = scaling_of(longest, eps);
  const Sides<T> s = scaled(sides_of(a, b), by.shrink);
  const T inter = area_of(s.wi, s.hi);
  const T uni = area_of(s.w1, s.h1) + area_of(s.w2, s.h2) - inter + by.eps;
  const T around = area_of(hull.w * by.shrink, hull.h * by.shrink) + by.eps;
  const T per_uni = T(1) / uni, per_around = T(1) / around;
  const T iou = quotient(inter, uni, per_uni), r = quotient(uni, around, per_around);
  const T d_uni = iou * per_uni - per_around;  // U = area a + area b - I
  // NaN for an infinite side, as in box_iou.h.
  const T loss = (T(1) - iou) + (T(1) - r) + (longest - longest);
  return {loss, by.shrink, (-per_uni - d_uni) * by.shrink, d_uni * by.shrink,
          r * per_around * by.shrink};
}

// dL / da, times g. The loss is the same for (b, a), whose a is the other box.
template <typename T>
HQOD_HD Box<T> generalized_box_iou_grad(const Box<T>& a, const Box<T>& b,
                                        const GeneralizedBoxIoU<T>& v, T g) {
  const Sides<T> s = scaled(sides_of(a, b), v.shrink);
  const Hull<T> hull = hull_of(a, b);
  const AreaGrad<T> d = area_grad(hull.w * v.shrink, hull.h * v.shrink, g * v.d_hull);
  const Box<T> areas = areas_grad(a, b, s.wi, s.hi, s.w1, s.h1, g * v.d_inter, g * v.d_area);
  return {areas.x1 - d.w * share(b.x1, a.x1), areas.y1 - d.h * share(b.y1, a.y1),
          areas.x2 + d.w * share(a.x2, b.x2), areas.y2 + d.h * share(a.y2, b.y2)};
}

HQOD_MATH_END
