// The IoU of pairs of boxes, as a loss.
//
// A formula has the Type it computes in, its Inputs and its stages (inputs.h). with_<loss>(call, f)
// calls f with the formula of the call's dtype and options. Those are a struct of the loss, for
// which its op (csrc/ops) and its formula agree; this one has none.
#pragma once

#include "kernels/loss_call.h"
#include "kernels/losses/inputs.h"

HQOD_MATH_BEGIN

template <typename T>
struct BoxIoULoss {
  using Type = T;
  template <int64_t n>
  using Inputs = BoxInputs<T, n>;
  static constexpr int kStages = 1;

  template <int, bool grad, int64_t n>
  HQOD_HD void stage(BoxInputs<T, n>& in, int64_t i) const {
    in.template set_overlap<grad>(i);
    in.loss[i] = in.iou[i];
    in.d_iou[i] = T(1);
  }
};

template <typename F>
void with_box_iou(const LossCall& call, F&& f) {
  with_compute_type(call.dtype, [&](auto tag) { f(BoxIoULoss<decltype(tag)>{}); });
}

HQOD_MATH_END
