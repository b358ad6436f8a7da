// The CUDA kernels of the losses, for host code. They run on a stream and throw std::runtime_error.
#pragma once

#include "kernels/cuda/launch_types.h"
#include "kernels/loss_call.h"
#include "kernels/loss_list.h"

namespace hqod {

// One chunk of kLossChunk samples a block. A total over several chunks needs call.partial_sums, and
// cuda_loss_total afterwards.
#define HQOD_DECLARE_CUDA_LOSS(name) \
  void cuda_##name(const LossCall& call, bool backward, Stream stream);
HQOD_LOSSES(HQOD_DECLARE_CUDA_LOSS)

void cuda_loss_total(const LossCall& call, Stream stream);

}  // namespace hqod
