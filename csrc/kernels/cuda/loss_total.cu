#include "kernels/cuda/loss.h"

namespace hqod {

void cuda_loss_total(const LossCall& call, Stream stream) {
  launch(LossTotalKernel{call.partial_sums, cuda_loss_chunks(call), call.total, call.loss_dtype(),
                         call.factor},
         1, stream);
}

}  // namespace hqod
