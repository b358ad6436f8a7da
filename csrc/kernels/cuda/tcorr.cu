#include "kernels/cuda/loss.h"
#include "kernels/losses/tcorr.h"

HQOD_DEFINE_CUDA_LOSS(tcorr)
