// The CUDA kernels of the losses, for host code. They run on a stream and throw std::runtime_error.
#pragma once

#include "kernels/cuda/launch_types.h"
#include "kernels/loss_call.h"
#include "kernels/loss_list.h"

namespace hqod {

// Samples of a block, one a thread: few, so that a detector's some thousands are spread over the
// device.
inline constexpr int64_t kCudaLossChunk = 256;

// A total over up to so many samples is the work of one block, several samples a thread: one
// launch, where the partial sums of several blocks need a second one.
inline constexpr int64_t kCudaLossSingle = 1024;

inline int64_t cuda_loss_chunks(const LossCall& call) {
  if (call.total != nullptr && call.count <= kCudaLossSingle) return call.count > 0;
  return (call.count + kCudaLossChunk - 1) / kCudaLossChunk;
}

// One chunk a block. A total over several chunks needs call.partial_sums, and
// cuda_loss_total afterwards.
#define HQOD_DECLARE_CUDA_LOSS(name) \
  void cuda_##name(const LossCall& call, bool backward, Stream stream);
HQOD_LOSSES(HQOD_DECLARE_CUDA_LOSS)

void cuda_loss_total(const LossCall& call, Stream stream);

}  // namespace hqod
