// One call of a loss kernel: pointers and parameters, no tensor. Shared by the CPU and CUDA
// kernels.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace hqod {

struct LossCall {
  Dtype dtype;                      // of boxes, scores and their gradients
  Dtype weight_dtype;               // of weight
  int64_t count;                    // N, the number of samples
  const void* pred = nullptr;       // [N, 4]
  const void* target = nullptr;     // [N, 4]
  const void* scores = nullptr;     // [N]
  const void* ious = nullptr;       // [N]
  const void* weight = nullptr;     // [N] or null: all 1
  bool logits = false;              // scores are logits
  int variant = 0;                  // TCorrVariant
  double alpha = 1.5, gamma = 0.8;  // of HIoU
  double hiou_weight = 1.0, tcorr_weight = 1.0;

  // The result of a forward pass: one of the two. The loss is in the compute type.
  void* loss = nullptr;            // [N]
  double* partial_sums = nullptr;  // [ceil(N / kLossChunk)]

  // Backward: the gradient of each requested input, from the loss' own gradient. A pass that has no
  // such gradient (null: 1) fills partial_sums beside the gradients.
  const void* grad = nullptr;  // [N] or, for a reduced loss, [1]; in the compute type
  bool grad_is_scalar = false;
  double factor = 1.0;       // of every gradient: 1 / N for a mean
  void* d_pred = nullptr;    // [N, 4] or null
  void* d_target = nullptr;  // [N, 4] or null
  void* d_scores = nullptr;  // [N] or null
  void* d_ious = nullptr;    // [N] or null
};

// Samples of one partial sum: fixed, so that a sum does not depend on the number of threads.
inline constexpr int64_t kLossChunk = 1024;

}  // namespace hqod
