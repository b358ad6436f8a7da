// Intersection over union of two boxes (x1, y1, x2, y2), and its gradient.
//
//   iou = inter / max(area1 + area2 - inter, 1e-6), sides clamped at 0
//
// Source: the HQOD code. Boxes with a side above 2^60 are scaled by 2^-70 first, so that no area
// overflows float, with 1e-30 for the least union; the gradient is scaled alike. A box with an
// infinite side has the IoU NaN: a quotient of 0 would hide that its gradient is none.
//
// What the losses of other areas need too stands here: sides, clamped areas and their gradients.
#pragma once

#include "math/elementary.h"

HQOD_MATH_BEGIN

template <typename T>
struct Box {
  T x1, y1, x2, y2;
};

// Sides of box a, of box b and of their intersection, not clamped.
template <typename T>
struct Sides {
  T w1, h1, w2, h2, wi, hi;
};

template <typename T>
HQOD_HD Sides<T> sides_of(const Box<T>& a, const Box<T>& b) {
  return {a.x2 - a.x1,
          a.y2 - a.y1,
          b.x2 - b.x1,
          b.y2 - b.y1,
          (a.x2 < b.x2 ? a.x2 : b.x2) - (a.x1 > b.x1 ? a.x1 : b.x1),
          (a.y2 < b.y2 ? a.y2 : b.y2) - (a.y1 > b.y1 ? a.y1 : b.y1)};
}

template <typename T>
HQOD_HD Sides<T> scaled(const Sides<T>& s, T factor) {
  return {s.w1 * factor, s.h1 * factor, s.w2 * factor, s.h2 * factor, s.wi * factor, s.hi * factor};
}

// Sides of the smallest box around both, not clamped.
template <typename T>
struct Hull {
  T w, h;
};

template <typename T>
HQOD_HD Hull<T> hull_of(const Box<T>& a, const Box<T>& b) {
  return {(a.x2 > b.x2 ? a.x2 : b.x2) - (a.x1 < b.x1 ? a.x1 : b.x1),
          (a.y2 > b.y2 ? a.y2 : b.y2) - (a.y1 < b.y1 ? a.y1 : b.y1)};
}

// How boxes whose longest side this is are scaled, and what eps is for them.
template <typename T>
struct Scaling {
  T shrink, eps;
};

template <typename T>
HQOD_HD Scaling<T> scaling_of(T longest, T eps) {
  const bool large = longest > T(0x1p60);
  return {large ? T(0x1p-70) : T(1), large ? T(1e-30) : eps};
}

template <typename T>
HQOD_HD T area_of(T w, T h) {
  return at_least(w, T(0)) * at_least(h, T(0));
}

template <typename T>
struct Overlap : Sides<T> {  // scaled
  T iou;
  T per_union;    // 1 / max(union, eps), and the factor of the sides once more
  T union_share;  // iou, or 0 where the union is the constant eps
};

template <typename T>
HQOD_HD Overlap<T> box_overlap(const Box<T>& a, const Box<T>& b) {
  const Sides<T> sides = sides_of(a, b);
  const T m1 = sides.w1 > sides.h1 ? sides.w1 : sides.h1;
  const T m2 = sides.w2 > sides.h2 ? sides.w2 : sides.h2;
  const T longest = m1 > m2 ? m1 : m2;
  const Scaling<T> by = scaling_of(longest, T(1e-6));
  const Sides<T> s = scaled(sides, by.shrink);
  const T inter = area_of(s.wi, s.hi);
  const T uni = area_of(s.w1, s.h1) + area_of(s.w2, s.h2) - inter;
  const T divisor = at_least(uni, by.eps), inverse = T(1) / divisor;
  // As a division: exactly 1 for equal boxes. The difference is 0, or NaN for an infinite side.
  const T iou = quotient(inter, divisor, inverse) + (longest - longest);
  return {s, iou, inverse * by.shrink, uni < by.eps ? T(0) : iou};
}

// 1 where a > b, one half where they tie (the tied edges share the gradient), else 0.
template <typename T>
HQOD_HD T share(T a, T b) {
  return (a > b ? T(0.5) : T(0)) + (a >= b ? T(0.5) : T(0));
}

// d area_of(w, h), times g: a side of length 0 passes gradient, a negative one does not.
template <typename T>
struct AreaGrad {
  T w, h;
};

template <typename T>
HQOD_HD AreaGrad<T> area_grad(T w, T h, T g) {
  const T zero = T(0);
  return {w < zero ? zero : g * at_least(h, zero), h < zero ? zero : g * at_least(w, zero)};
}

// The gradient in box a of a function of the areas, from its slopes in the intersection, of sides
// (wi, hi), and in a's own area, of sides (w, h).
template <typename T>
HQOD_HD Box<T> areas_grad(const Box<T>& a, const Box<T>& b, T wi, T hi, T w, T h, T d_inter,
                          T d_area) {
  const AreaGrad<T> inter = area_grad(wi, hi, d_inter), own = area_grad(w, h, d_area);
  return {-inter.w * share(a.x1, b.x1) - own.w, -inter.h * share(a.y1, b.y1) - own.h,
          inter.w * share(b.x2, a.x2) + own.w, inter.h * share(b.y2, a.y2) + own.h};
}

// d iou / d a, times g. (w, h) are a's own sides in o: (o.w1, o.h1), or (o.w2, o.h2) for the
// second.
template <typename T>
HQOD_HD Box<T> box_iou_grad(const Box<T>& a, const Box<T>& b, const Overlap<T>& o, T w, T h, T g) {
  const T scaled = g * o.per_union;
  return areas_grad(a, b, o.wi, o.hi, w, h, scaled * (T(1) + o.union_share),
                    -scaled * o.union_share);
}

HQOD_MATH_END
