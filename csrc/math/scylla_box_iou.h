// SCYLLA IoU loss (SIoU) of two boxes, and its slopes.
//
//   L = 1 - iou + (D + S) / 2
//   D = sum over x and y of 1 - exp(-(2 - A) d^2 / (hull^2 + eps)),  A = 2 |dx dy| / (dx^2 + dy^2 +
//   eps) S = sum over w and h of (1 - exp(-|w1 - w2| / (max(w1, w2) + eps)))^4
//
// A is the angle cost, sin(2 asin(|dy| / distance)), written without the angle.
//
// Source: SIoU (arXiv:2205.12740), with an eps as in torchvision's losses.
#pragma once

#include "math/box_pair.h"

HQOD_MATH_BEGIN

// S for one side, and its slopes.
template <typename T>
struct ShapeCost {
  T cost, first, second;
};

template <typename T>
HQOD_HD ShapeCost<T> shape_cost(T side1, T side2, T eps) {
  const T apart = side1 - side2;
  const T inverse = T(1) / (greater(side1, side2) + eps), ratio = magnitude(apart) * inverse;
  const T e = exp_within(-ratio), rest = T(1) - e, cube = rest * rest * rest;
  const T slope = T(4) * cube * e * inverse, sign = sign_of(apart);
  return {cube * rest, slope * (sign - ratio * share(side1, side2)),
          slope * (-sign - ratio * share(side2, side1))};
}

struct ScyllaBoxIoU {
  template <typename T>
  static HQOD_HD PairLoss<T> of(const BoxPair<T>& p) {
    PairLoss<T> out = iou_part(p);
    const T half = T(0.5);
    const T far_x = magnitude(p.dx), far_y = magnitude(p.dy);
    const T per_square = T(1) / (p.dx * p.dx + p.dy * p.dy + p.eps);
    const T angle = T(2) * far_x * far_y * per_square, gamma = T(2) - angle;
    const T per_w = T(1) / (p.hull_w * p.hull_w + p.eps);
    const T per_h = T(1) / (p.hull_h * p.hull_h + p.eps);
    const T ratio_x = p.dx * p.dx * per_w, ratio_y = p.dy * p.dy * per_h;
    const T e_x = exp_within(-gamma * ratio_x), e_y = exp_within(-gamma * ratio_y);
    const ShapeCost<T> w = shape_cost(p.w1, p.w2, p.eps), h = shape_cost(p.h1, p.h2, p.eps);
    out.loss += half * (((T(1) - e_x) + (T(1) - e_y)) + (w.cost + h.cost));

    const T d_x = half * gamma * e_x, d_y = half * gamma * e_y;  // slopes in the ratios
    const T d_angle = -half * (ratio_x * e_x + ratio_y * e_y);
    const T turn = T(2) * d_angle * per_square;
    out.slope.dx = T(2) * p.dx * (d_x * per_w) + turn * (far_y * sign_of(p.dx) - angle * p.dx);
    out.slope.dy = T(2) * p.dy * (d_y * per_h) + turn * (far_x * sign_of(p.dy) - angle * p.dy);
    out.slope.hull_w = -T(2) * ratio_x * p.hull_w * per_w * d_x;
    out.slope.hull_h = -T(2) * ratio_y * p.hull_h * per_h * d_y;
    out.slope.w1 = half * w.first;
    out.slope.w2 = half * w.second;
    out.slope.h1 = half * h.first;
    out.slope.h2 = half * h.second;
    return settled(p, out);
  }
};

HQOD_MATH_END
