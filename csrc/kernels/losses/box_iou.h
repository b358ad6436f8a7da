// The IoU of pairs of boxes, as a loss.
//
// A formula has the Type it computes in and its Inputs; loss(inputs, i), and grad<target_grad>(
// inputs, i, g), which leaves sample i's gradients in inputs and returns its loss.
// with_<loss>(call, f) calls f with a formula that has the call's options as compile-time
// constants.
#pragma once

#include "kernels/loss_call.h"
#include "kernels/losses/inputs.h"

HQOD_MATH_BEGIN

template <typename T>
struct BoxIoULoss {
  using Type = T;
  template <int64_t n>
  using Inputs = BoxInputs<T, n>;

  template <int64_t n>
  HQOD_HD T loss(const BoxInputs<T, n>& in, int64_t i) const {
    return in.overlap(i).iou;
  }

  template <bool target_grad, int64_t n>
  HQOD_HD T grad(BoxInputs<T, n>& in, int64_t i, T g) const {
    const Overlap<T> o = in.overlap(i);
    in.template set_grad<target_grad>(i, o, g);
    return o.iou;
  }
};

template <typename F>
void with_box_iou(const LossCall& call, F&& f) {
  with_compute_type(call.dtype, [&](auto tag) { f(BoxIoULoss<decltype(tag)>{}); });
}

HQOD_MATH_END
