// The generalized IoU loss of pairs of boxes.
#pragma once

#include "kernels/loss_call.h"
#include "kernels/losses/inputs.h"
#include "math/generalized_box_iou.h"

namespace hqod {

struct GeneralizedBoxIoUOptions {
  double eps;
};

}  // namespace hqod

HQOD_MATH_BEGIN

// No function of the IoU: its slopes in three areas are what it leaves for finish().
template <typename T, int64_t n>
struct GeneralizedBoxIoUInputs {
  static constexpr bool boxes = true, scores = false, ious = false;
  BoxBlock<T, n> pred, target, d_pred, d_target;
  HQOD_BLOCK loss[n], shrink[n], d_inter[n], d_area[n], d_hull[n];

  template <bool target_grad>
  HQOD_HD void finish(int64_t i, T g) {
    const GeneralizedBoxIoU<T> v{loss[i], shrink[i], d_inter[i], d_area[i], d_hull[i]};
    const Box<T> a = pred[i], b = target[i];
    d_pred.set(i, generalized_box_iou_grad(a, b, v, g));
    if constexpr (target_grad) d_target.set(i, generalized_box_iou_grad(b, a, v, g));
  }
};

template <typename T>
struct GeneralizedBoxIoULoss {
  using Type = T;
  template <int64_t n>
  using Inputs = GeneralizedBoxIoUInputs<T, n>;
  static constexpr int kStages = 1;
  T eps;

  template <int, bool grad, int64_t n>
  HQOD_HD void stage(GeneralizedBoxIoUInputs<T, n>& in, int64_t i) const {
    const GeneralizedBoxIoU<T> v = generalized_box_iou(in.pred[i], in.target[i], eps);
    in.loss[i] = v.loss;
    if constexpr (grad) {
      in.shrink[i] = v.shrink;
      in.d_inter[i] = v.d_inter;
      in.d_area[i] = v.d_area;
      in.d_hull[i] = v.d_hull;
    }
  }
};

template <typename F>
void with_generalized_box_iou(const LossCall& call, F&& f) {
  const auto& options = call.options_as<GeneralizedBoxIoUOptions>();
  with_compute_type(call.dtype, [&](auto tag) {
    using T = decltype(tag);
    f(GeneralizedBoxIoULoss<T>{static_cast<T>(options.eps)});
  });
}

HQOD_MATH_END
