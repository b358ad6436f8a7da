#include "kernels/losses/hqod.h"

#include "kernels/cpu/loss_loop.h"

HQOD_DEFINE_LOSS_KERNELS(hqod)
