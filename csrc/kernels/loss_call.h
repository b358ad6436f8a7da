// One call of a loss kernel: pointers and parameters, no tensor. Shared by the CPU and CUDA
// kernels.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace hqod {

struct LossCall {
  Dtype dtype;                    // of boxes, scores and their gradients
  Dtype weight_dtype;             // of weight
  int64_t count;                  // N, the number of samples
  const void* pred = nullptr;     // [N, 4]
  const void* target = nullptr;   // [N, 4]
  const void* scores = nullptr;   // [N]
  const void* ious = nullptr;     // [N]
  const void* weight = nullptr;   // [N] or null: all 1
  const void* options = nullptr;  // in host memory: the loss' own struct, see kernels/losses

  // The result of a forward pass, in the compute type: one of the two.
  void* loss = nullptr;   // [N]
  void* total = nullptr;  // [1]: the sum times factor
  double factor = 1.0;    // 1 / N for a mean

  // Backward: the gradient of each requested input, factor included, from the loss' own gradient.
  // A pass that has no such gradient (null: 1) yields the total beside the gradients.
  const void* grad = nullptr;  // [N] or, for a reduced loss, [1]; in the compute type
  bool grad_is_scalar = false;
  void* d_pred = nullptr;    // [N, 4] or null
  void* d_target = nullptr;  // [N, 4] or null
  void* d_scores = nullptr;  // [N] or null
  void* d_ious = nullptr;    // [N] or null

  double* partial_sums = nullptr;  // [chunks]: where the device sums on its way

  template <typename Options>
  const Options& options_as() const {
    return *static_cast<const Options*>(options);
  }

  Dtype loss_dtype() const { return dtype == Dtype::kFloat64 ? dtype : Dtype::kFloat32; }
};

// Samples of one partial sum on the CPU: fixed, so that a sum does not depend on the number of
// threads.
inline constexpr int64_t kLossChunk = 1024;

inline int64_t loss_chunks(const LossCall& call) {
  return (call.count + kLossChunk - 1) / kLossChunk;
}

}  // namespace hqod
