// The complete IoU loss of pairs of boxes.
#pragma once

#include "kernels/losses/box_pair.h"
#include "math/complete_box_iou.h"

HQOD_MATH_BEGIN

template <typename F>
void with_complete_box_iou(const LossCall& call, F&& f) {
  with_box_pair<CompleteBoxIoU>(call, f);
}

HQOD_MATH_END
