#include "kernels/losses/box_iou.h"

#include "kernels/cpu/loss_loop.h"

HQOD_DEFINE_LOSS_KERNELS(box_iou)
