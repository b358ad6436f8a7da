#include "kernels/cuda/loss.h"
#include "kernels/losses/harmonious_iou.h"

HQOD_DEFINE_CUDA_LOSS(harmonious_iou)
