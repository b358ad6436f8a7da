#include "kernels/losses/harmonious_iou.h"

#include "kernels/cpu/loss_loop.h"

HQOD_DEFINE_LOSS_KERNELS(harmonious_iou)
