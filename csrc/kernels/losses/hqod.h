// The HQOD loss: HIoU and TCorr of a box and its score, weighted and added.
#pragma once

#include "kernels/losses/tcorr.h"
#include "math/harmonious_iou.h"

HQOD_MATH_BEGIN

template <typename T, TCorrVariant variant, bool logits>
struct HqodLoss {
  using Type = T;
  template <int64_t n>
  using Inputs = BoxAndScoreInputs<T, n>;
  T alpha, gamma, hiou_weight, tcorr_weight;

  template <int64_t n>
  HQOD_HD T loss(const BoxAndScoreInputs<T, n>& in, int64_t i) const {
    const T iou = in.overlap(i).iou;
    return hiou_weight * harmonious_iou(iou, alpha, gamma).loss +
           tcorr_weight * tcorr<T, variant, logits, true>(in.score[i], iou).loss;
  }

  template <bool target_grad, int64_t n>
  HQOD_HD T grad(BoxAndScoreInputs<T, n>& in, int64_t i, T g) const {
    const Overlap<T> o = in.overlap(i);
    const TCorr<T> t = tcorr<T, variant, logits, true>(in.score[i], o.iou);
    const HarmoniousIoU<T> h = harmonious_iou(o.iou, alpha, gamma);
    in.template set_grad<target_grad>(i, o, g * (hiou_weight * h.slope + tcorr_weight * t.d_iou));
    in.d_score[i] = g * tcorr_weight * t.d_score;
    return hiou_weight * h.loss + tcorr_weight * t.loss;
  }
};

template <typename F>
void with_hqod(const LossCall& call, F&& f) {
  with_compute_type(call.dtype, [&](auto tag) {
    using T = decltype(tag);
    with_tcorr_options(call, [&](auto variant, auto logits) {
      f(HqodLoss<T, variant.value, logits.value>{
          static_cast<T>(call.alpha), static_cast<T>(call.gamma), static_cast<T>(call.hiou_weight),
          static_cast<T>(call.tcorr_weight)});
    });
  });
}

HQOD_MATH_END
