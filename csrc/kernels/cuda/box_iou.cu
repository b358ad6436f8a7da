#include "kernels/cuda/loss.h"
#include "kernels/losses/box_iou.h"

HQOD_DEFINE_CUDA_LOSS(box_iou)
