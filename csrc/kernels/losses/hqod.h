// The HQOD loss: HIoU and TCorr of a box and its score, weighted and added.
#pragma once

#include "kernels/losses/tcorr.h"
#include "math/harmonious_iou.h"

namespace hqod {

struct HqodOptions {
  TCorrOptions tcorr;
  double alpha, gamma, hiou_weight, tcorr_weight;
};

}  // namespace hqod

HQOD_MATH_BEGIN

template <typename T, TCorrVariant variant, bool logits>
struct HqodLoss {
  using Type = T;
  template <int64_t n>
  using Inputs = BoxAndScoreInputs<T, n>;
  static constexpr int kStages = 4;
  T alpha, gamma, hiou_weight, tcorr_weight;

  template <int k, bool grad, int64_t n>
  HQOD_HD void stage(BoxAndScoreInputs<T, n>& in, int64_t i) const {
    if constexpr (k == 0) {
      in.template set_overlap<grad>(i);
    } else if constexpr (k == 1) {
      const HarmoniousIoU<T> h = harmonious_iou(in.iou[i], alpha, gamma);
      in.loss[i] = hiou_weight * h.loss;
      in.d_iou[i] = hiou_weight * h.slope;
    } else if constexpr (k == 2) {
      in.set(i, tcorr_terms<logits, true>(in.score[i], in.iou[i]));
    } else {
      const TCorr<T> t = tcorr<variant, logits, true>(in.score[i], in.iou[i], in.terms(i));
      in.loss[i] += tcorr_weight * t.loss;
      in.d_iou[i] += tcorr_weight * t.d_iou;
      in.d_score[i] = tcorr_weight * t.d_score;
    }
  }
};

template <typename F>
void with_hqod(const LossCall& call, F&& f) {
  const auto& options = call.options_as<HqodOptions>();
  with_compute_type(call.dtype, [&](auto tag) {
    using T = decltype(tag);
    with_tcorr_options(options.tcorr, [&](auto variant, auto logits) {
      f(HqodLoss<T, variant.value, logits.value>{
          static_cast<T>(options.alpha), static_cast<T>(options.gamma),
          static_cast<T>(options.hiou_weight), static_cast<T>(options.tcorr_weight)});
    });
  });
}

HQOD_MATH_END
