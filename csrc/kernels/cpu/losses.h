// The CPU kernels of the losses, each over a range of chunks of kLossChunk samples.
#pragma once

#include "kernels/cpu/isa.h"
#include "kernels/loss_call.h"
#include "kernels/loss_list.h"

#define HQOD_DECLARE_LOSS_KERNELS(name)                                                 \
  HQOD_DECLARE_KERNEL(name##_forward, const LossCall& call, int64_t begin, int64_t end) \
  HQOD_DECLARE_KERNEL(name##_backward, const LossCall& call, int64_t begin, int64_t end)

HQOD_LOSSES(HQOD_DECLARE_LOSS_KERNELS)
