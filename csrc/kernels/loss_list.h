// Every loss has its line here, from which CMake knows its sources too: csrc/ops/<name>.cpp, and
// csrc/kernels/losses/<name>.h, whose formula it compiles into the loops of each device.
#pragma once

#define HQOD_LOSSES(X)   \
  X(box_iou)             \
  X(harmonious_iou)      \
  X(tcorr)               \
  X(hqod)                \
  X(generalized_box_iou) \
  X(distance_box_iou)    \
  X(complete_box_iou)    \
  X(efficient_box_iou)   \
  X(scylla_box_iou)
