#include "math/harmonious_iou.h"

#include "kernels/cpu/loss_inputs.h"
#include "kernels/cpu/losses.h"

HQOD_MATH_BEGIN

template <typename T, bool target_grad>
struct HarmoniousIoULoss {
  using Type = T;
  using Inputs = BoxInputs<T, target_grad>;
  T alpha, gamma;

  explicit HarmoniousIoULoss(const LossCall& call)
      : alpha(static_cast<T>(call.alpha)), gamma(static_cast<T>(call.gamma)) {}

  HQOD_HD T loss(const Inputs& in, int64_t i) const {
    return harmonious_iou(in.overlap(i).iou, alpha, gamma).loss;
  }

  HQOD_HD T grad(Inputs& in, int64_t i, T g) const {
    const Overlap<T> o = in.overlap(i);
    const HarmoniousIoU<T> h = harmonious_iou(o.iou, alpha, gamma);
    in.set_grad(i, o, g * h.slope);
    return h.loss;
  }
};

HQOD_MATH_END

namespace hqod {

void HQOD_KERNEL_NAME(harmonious_iou_forward)(const LossCall& call, int64_t begin, int64_t end) {
  with_compute_type(call.dtype, [&](auto tag) {
    using T = decltype(tag);
    loss_forward<HarmoniousIoULoss<T, false>>(call, begin, end);
  });
}

void HQOD_KERNEL_NAME(harmonious_iou_backward)(const LossCall& call, int64_t begin, int64_t end) {
  with_compute_type(call.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (call.d_target != nullptr) {
      loss_backward<HarmoniousIoULoss<T, true>>(call, begin, end);
    } else {
      loss_backward<HarmoniousIoULoss<T, false>>(call, begin, end);
    }
  });
}

}  // namespace hqod
