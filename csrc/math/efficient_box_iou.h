// Efficient IoU loss of two boxes, and its slopes: the distance IoU loss and
//
//   (w1 - w2)^2 / (W^2 + eps) + (h1 - h2)^2 / (H^2 + eps)
//
// with W and H the sides of the smallest box around both.
//
// Source: EIoU (arXiv:2101.08158), with an eps as in torchvision's losses.
#pragma once

#include "math/box_pair.h"

HQOD_MATH_BEGIN

struct EfficientBoxIoU {
  template <typename T>
  static HQOD_HD PairLoss<T> of(const BoxPair<T>& p) {
    PairLoss<T> out = iou_part(p);
    add_distance(p, out);
    const T w = p.w1 - p.w2, h = p.h1 - p.h2;
    const T per_w = T(1) / (p.hull_w * p.hull_w + p.eps);
    const T per_h = T(1) / (p.hull_h * p.hull_h + p.eps);
    const T ratio_w = w * w * per_w, ratio_h = h * h * per_h;
    out.loss += ratio_w + ratio_h;
    out.slope.w1 = T(2) * w * per_w;
    out.slope.h1 = T(2) * h * per_h;
    out.slope.w2 = -out.slope.w1;
    out.slope.h2 = -out.slope.h1;
    out.slope.hull_w -= T(2) * ratio_w * p.hull_w * per_w;
    out.slope.hull_h -= T(2) * ratio_h * p.hull_h * per_h;
    return settled(p, out);
  }
};

HQOD_MATH_END
