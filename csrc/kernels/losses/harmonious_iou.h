// The harmonious IoU loss of pairs of boxes.
#pragma once

#include "kernels/loss_call.h"
#include "kernels/losses/inputs.h"
#include "math/harmonious_iou.h"

namespace hqod {

struct HarmoniousIoUOptions {
  double alpha, gamma;
};

}  // namespace hqod

HQOD_MATH_BEGIN

template <typename T>
struct HarmoniousIoULoss {
  using Type = T;
  template <int64_t n>
  using Inputs = BoxInputs<T, n>;
  static constexpr int kStages = 2;
  T alpha, gamma;

  template <int k, bool grad, int64_t n>
  HQOD_HD void stage(BoxInputs<T, n>& in, int64_t i) const {
    if constexpr (k == 0) return in.template set_overlap<grad>(i);
    const HarmoniousIoU<T> h = harmonious_iou(in.iou[i], alpha, gamma);
    in.loss[i] = h.loss;
    in.d_iou[i] = h.slope;
  }
};

template <typename F>
void with_harmonious_iou(const LossCall& call, F&& f) {
  const auto& options = call.options_as<HarmoniousIoUOptions>();
  with_compute_type(call.dtype, [&](auto tag) {
    using T = decltype(tag);
    f(HarmoniousIoULoss<T>{static_cast<T>(options.alpha), static_cast<T>(options.gamma)});
  });
}

HQOD_MATH_END
