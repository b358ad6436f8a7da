// The efficient IoU loss of pairs of boxes.
#pragma once

#include "kernels/losses/box_pair.h"
#include "math/efficient_box_iou.h"

HQOD_MATH_BEGIN

template <typename F>
void with_efficient_box_iou(const LossCall& call, F&& f) {
  with_box_pair<EfficientBoxIoU>(call, f);
}

HQOD_MATH_END
