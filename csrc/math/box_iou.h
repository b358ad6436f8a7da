// Intersection over union of two boxes (x1, y1, x2, y2), and its gradient.
//
//   iou = inter / max(area1 + area2 - inter, 1e-6), sides clamped at 0
//
// Source: the HQOD code. Boxes with a side above 2^60 are scaled by 2^-70 first, so that no area
// overflows float, with 1e-30 for the least union; the gradient is scaled alike. A box with an
// infinite side has the IoU NaN: a quotient of 0 would hide that its gradient is none.
#pragma once

#include "math/elementary.h"

HQOD_MATH_BEGIN

template <typename T>
struct Box {
  T x1, y1, x2, y2;
};

template <typename T>
struct Overlap {
  T iou;
  T w1, h1, w2, h2;  // sides, not clamped, scaled
  T wi, hi;          // sides of the intersection, likewise
  T per_union;       // 1 / max(union, eps), and the factor of the sides once more
  T union_share;     // iou, or 0 where the union is the constant eps
};

template <typename T>
HQOD_HD Overlap<T> box_overlap(const Box<T>& a, const Box<T>& b) {
  const T w1 = a.x2 - a.x1, h1 = a.y2 - a.y1, w2 = b.x2 - b.x1, h2 = b.y2 - b.y1;
  const T wi = (a.x2 < b.x2 ? a.x2 : b.x2) - (a.x1 > b.x1 ? a.x1 : b.x1);
  const T hi = (a.y2 < b.y2 ? a.y2 : b.y2) - (a.y1 > b.y1 ? a.y1 : b.y1);
  const T m1 = w1 > h1 ? w1 : h1, m2 = w2 > h2 ? w2 : h2;
  const T longest = m1 > m2 ? m1 : m2;
  const T shrink = longest > T(0x1p60) ? T(0x1p-70) : T(1);
  Overlap<T> o;
  o.w1 = w1 * shrink;
  o.h1 = h1 * shrink;
  o.w2 = w2 * shrink;
  o.h2 = h2 * shrink;
  o.wi = wi * shrink;
  o.hi = hi * shrink;
  const T zero = T(0), eps = longest > T(0x1p60) ? T(1e-30) : T(1e-6);
  const T inter = at_least(o.wi, zero) * at_least(o.hi, zero);
  const T area1 = at_least(o.w1, zero) * at_least(o.h1, zero);
  const T area2 = at_least(o.w2, zero) * at_least(o.h2, zero);
  const T uni = area1 + area2 - inter;
  const T divisor = at_least(uni, eps), inverse = T(1) / divisor;
  // As a division: exactly 1 for equal boxes. The difference is 0, or NaN for an infinite side.
  o.iou = quotient(inter, divisor, inverse) + (longest - longest);
  o.per_union = inverse * shrink;
  o.union_share = uni < eps ? zero : o.iou;
  return o;
}

// 1 where a > b, one half where they tie (the tied edges share the gradient), else 0.
template <typename T>
HQOD_HD T share(T a, T b) {
  return (a > b ? T(0.5) : T(0)) + (a >= b ? T(0.5) : T(0));
}

// d iou / d a, times g. (w, h) are a's own sides in o: (o.w1, o.h1), or (o.w2, o.h2) for the
// second.
template <typename T>
HQOD_HD Box<T> box_iou_grad(const Box<T>& a, const Box<T>& b, const Overlap<T>& o, T w, T h, T g) {
  const T zero = T(0);
  const T scaled = g * o.per_union;
  const T d_inter = scaled * (T(1) + o.union_share), d_area = -scaled * o.union_share;
  const T d_wi = o.wi < zero ? zero : d_inter * at_least(o.hi, zero);
  const T d_hi = o.hi < zero ? zero : d_inter * at_least(o.wi, zero);
  const T d_w = w < zero ? zero : d_area * at_least(h, zero);
  const T d_h = h < zero ? zero : d_area * at_least(w, zero);
  return {-d_wi * share(a.x1, b.x1) - d_w, -d_hi * share(a.y1, b.y1) - d_h,
          d_wi * share(b.x2, a.x2) + d_w, d_hi * share(b.y2, a.y2) + d_h};
}

HQOD_MATH_END
