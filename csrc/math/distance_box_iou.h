// Distance IoU loss of two boxes, and its slopes.
//
//   L = 1 - iou + (dx^2 + dy^2) / (W^2 + H^2 + eps)
//
// with the distance (dx, dy) of the centres, and W and H the sides of the smallest box around both.
//
// Source: DIoU (arXiv:1911.08287), with the eps of torchvision.
#pragma once

#include "math/box_pair.h"

HQOD_MATH_BEGIN

struct DistanceBoxIoU {
  template <typename T>
  static HQOD_HD PairLoss<T> of(const BoxPair<T>& p) {
    PairLoss<T> out = iou_part(p);
    add_distance(p, out);
    return settled(p, out);
  }
};

HQOD_MATH_END
