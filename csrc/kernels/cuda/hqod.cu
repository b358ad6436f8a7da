#include "kernels/cuda/loss.h"
#include "kernels/losses/hqod.h"

HQOD_DEFINE_CUDA_LOSS(hqod)
