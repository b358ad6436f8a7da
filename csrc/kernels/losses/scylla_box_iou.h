// The SCYLLA IoU loss of pairs of boxes.
#pragma once

#include "kernels/losses/box_pair.h"
#include "math/scylla_box_iou.h"

HQOD_MATH_BEGIN

template <typename F>
void with_scylla_box_iou(const LossCall& call, F&& f) {
  with_box_pair<ScyllaBoxIoU>(call, f);
}

HQOD_MATH_END
