// Every loss has its line here: kernels/losses/<name>.h, and the two kernels of each device.
#pragma once

#define HQOD_LOSSES(X) \
  X(box_iou)           \
  X(harmonious_iou)    \
  X(tcorr)             \
  X(hqod)
