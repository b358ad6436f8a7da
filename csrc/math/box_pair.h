// What the losses of the IoU family are made of beside areas: the sides of two boxes, the distance
// of their centres, the sides of the smallest box around both; and the gradient of such a loss.
//
// Degenerate boxes: a negative side counts as 0, and the smallest box around both is at least as
// long as the centres are apart, which for boxes with x1 <= x2 it is anyway. Boxes that are further
// apart or longer than 2^60 are scaled as in box_iou.h, with 1e-30 for eps; with an infinite
// coordinate the loss is NaN.
#pragma once

#include "math/box_iou.h"

HQOD_MATH_BEGIN

// All of it scaled by `shrink`.
template <typename T>
struct BoxPair {
  T iou, per_union;         // of the union plus eps
  T dx, dy;                 // centre of a - centre of b
  T hull_w, hull_h;         // at least |dx| and |dy|
  T w1, h1, w2, h2;         // at least 0
  T loose_x, loose_y;       // where the hull is |dx|: the sign of dx, else 0
  T shrink, eps, infinite;  // infinite: 0, or NaN
};

// Slopes of a loss in what it is made of, and the factor of the sides once more.
template <typename T>
struct PairSlopes {
  T inter, area;  // of the intersection, and of either box
  T dx, dy, hull_w, hull_h, w1, h1, w2, h2;
  T shrink;
};

template <typename T>
struct PairLoss {
  T loss;
  PairSlopes<T> slope;
};

template <typename T>
HQOD_HD T greater(T a, T b) {
  return a > b ? a : b;
}

// -1, 0 or 1.
template <typename T>
HQOD_HD T sign_of(T x) {
  return (x > T(0) ? T(1) : T(0)) - (x < T(0) ? T(1) : T(0));
}

template <typename T>
HQOD_HD BoxPair<T> box_pair(const Box<T>& a, const Box<T>& b, T eps) {
  const Hull<T> hull = hull_of(a, b);
  const T dx = T(0.5) * (a.x1 - b.x1) + T(0.5) * (a.x2 - b.x2);
  const T dy = T(0.5) * (a.y1 - b.y1) + T(0.5) * (a.y2 - b.y2);
  const T longest =
      greater(greater(magnitude(hull.w), magnitude(hull.h)), greater(magnitude(dx), magnitude(dy)));
  const Scaling<T> by = scaling_of(longest, eps);
  const Sides<T> s = scaled(sides_of(a, b), by.shrink);
  BoxPair<T> p;
  p.shrink = by.shrink;
  p.eps = by.eps;
  p.infinite = longest - longest;
  p.w1 = at_least(s.w1, T(0));
  p.h1 = at_least(s.h1, T(0));
  p.w2 = at_least(s.w2, T(0));
  p.h2 = at_least(s.h2, T(0));
  p.dx = dx * by.shrink;
  p.dy = dy * by.shrink;
  const T w = hull.w * by.shrink, h = hull.h * by.shrink;
  const T far_x = magnitude(p.dx), far_y = magnitude(p.dy);
  p.hull_w = greater(far_x, w);
  p.hull_h = greater(far_y, h);
  p.loose_x = far_x > w ? sign_of(p.dx) : T(0);
  p.loose_y = far_y > h ? sign_of(p.dy) : T(0);
  const T inter = area_of(s.wi, s.hi);
  const T uni = p.w1 * p.h1 + p.w2 * p.h2 - inter + by.eps;
  p.per_union = T(1) / uni;
  p.iou = quotient(inter, uni, p.per_union);
  return p;
}

// 1 - IoU: where every loss of the family begins.
template <typename T>
HQOD_HD PairLoss<T> iou_part(const BoxPair<T>& p) {
  const T z = T(0), d_area = p.iou * p.per_union;  // U = area a + area b - I
  return {(T(1) - p.iou) + p.infinite,
          {-p.per_union - d_area, d_area, z, z, z, z, z, z, z, z, p.shrink}};
}

// The squared distance of the centres over the squared diagonal of the box around both.
template <typename T>
HQOD_HD void add_distance(const BoxPair<T>& p, PairLoss<T>& out) {
  const T inverse = T(1) / (p.hull_w * p.hull_w + p.hull_h * p.hull_h + p.eps);
  const T ratio = (p.dx * p.dx + p.dy * p.dy) * inverse;
  out.loss += ratio;
  out.slope.dx += T(2) * p.dx * inverse;
  out.slope.dy += T(2) * p.dy * inverse;
  out.slope.hull_w -= T(2) * ratio * p.hull_w * inverse;
  out.slope.hull_h -= T(2) * ratio * p.hull_h * inverse;
}

// The slope in a hull that is the distance itself goes to the distance.
template <typename T>
HQOD_HD PairLoss<T> settled(const BoxPair<T>& p, PairLoss<T> out) {
  out.slope.dx += p.loose_x * out.slope.hull_w;
  out.slope.dy += p.loose_y * out.slope.hull_h;
  out.slope.hull_w = p.loose_x != T(0) ? T(0) : out.slope.hull_w;
  out.slope.hull_h = p.loose_y != T(0) ? T(0) : out.slope.hull_h;
  return out;
}

// dL / da, times g, for the first box (sign 1) or the second (sign -1), with its own w and h.
template <typename T>
HQOD_HD Box<T> pair_grad(const Box<T>& a, const Box<T>& b, const PairSlopes<T>& d, T d_w, T d_h,
                         T sign, T g) {
  const Sides<T> s = scaled(sides_of(a, b), d.shrink);
  g *= d.shrink;
  const Box<T> areas = areas_grad(a, b, s.wi, s.hi, s.w1, s.h1, g * d.inter, g * d.area);
  const T x = T(0.5) * sign * g * d.dx, y = T(0.5) * sign * g * d.dy;
  const T w = s.w1 < T(0) ? T(0) : g * d_w, h = s.h1 < T(0) ? T(0) : g * d_h;
  const T hull_w = g * d.hull_w, hull_h = g * d.hull_h;
  return {
      areas.x1 + x - w - hull_w * share(b.x1, a.x1), areas.y1 + y - h - hull_h * share(b.y1, a.y1),
      areas.x2 + x + w + hull_w * share(a.x2, b.x2), areas.y2 + y + h + hull_h * share(a.y2, b.y2)};
}

HQOD_MATH_END
