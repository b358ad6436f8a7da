// The harmonious IoU loss of pairs of boxes.
#pragma once

#include "kernels/loss_call.h"
#include "kernels/losses/inputs.h"
#include "math/harmonious_iou.h"

HQOD_MATH_BEGIN

template <typename T>
struct HarmoniousIoULoss {
  using Type = T;
  template <int64_t n>
  using Inputs = BoxInputs<T, n>;
  T alpha, gamma;

  template <int64_t n>
  HQOD_HD T loss(const BoxInputs<T, n>& in, int64_t i) const {
    return harmonious_iou(in.overlap(i).iou, alpha, gamma).loss;
  }

  template <bool target_grad, int64_t n>
  HQOD_HD T grad(BoxInputs<T, n>& in, int64_t i, T g) const {
    const Overlap<T> o = in.overlap(i);
    const HarmoniousIoU<T> h = harmonious_iou(o.iou, alpha, gamma);
    in.template set_grad<target_grad>(i, o, g * h.slope);
    return h.loss;
  }
};

template <typename F>
void with_harmonious_iou(const LossCall& call, F&& f) {
  with_compute_type(call.dtype, [&](auto tag) {
    using T = decltype(tag);
    f(HarmoniousIoULoss<T>{static_cast<T>(call.alpha), static_cast<T>(call.gamma)});
  });
}

HQOD_MATH_END
