#include "kernels/losses/tcorr.h"

#include "kernels/cpu/loss_loop.h"

HQOD_DEFINE_LOSS_KERNELS(tcorr)
