// The task-correlation loss of pairs of score and IoU.
#pragma once

#include "kernels/loss_call.h"
#include "kernels/losses/inputs.h"
#include "math/tcorr.h"

namespace hqod {

struct TCorrOptions {
  bool logits;  // scores are logits
  int variant;  // TCorrVariant
};

}  // namespace hqod

HQOD_MATH_BEGIN

template <typename T, TCorrVariant variant, bool logits>
struct TCorrLoss {
  using Type = T;
  template <int64_t n>
  using Inputs = ScoreAndIouInputs<T, n>;
  static constexpr int kStages = 2;

  template <int k, bool grad, int64_t n>
  HQOD_HD void stage(ScoreAndIouInputs<T, n>& in, int64_t i) const {
    if constexpr (k == 0) return in.set(i, tcorr_terms<logits, false>(in.score[i], in.iou[i]));
    const TCorr<T> t = tcorr<variant, logits, false>(in.score[i], in.iou[i], in.terms(i));
    in.loss[i] = t.loss;
    in.d_score[i] = t.d_score;
    in.d_iou[i] = t.d_iou;
  }
};

template <auto v>
struct Constant {
  static constexpr auto value = v;
};

// Calls f(variant, logits) with TCorr's options as constants.
template <typename F>
void with_tcorr_options(const TCorrOptions& options, F&& f) {
  const auto with_variant = [&](auto variant) {
    options.logits ? f(variant, Constant<true>{}) : f(variant, Constant<false>{});
  };
  if (options.variant == static_cast<int>(TCorrVariant::kGeometric)) {
    return with_variant(Constant<TCorrVariant::kGeometric>{});
  }
  with_variant(Constant<TCorrVariant::kOfficial>{});
}

template <typename F>
void with_tcorr(const LossCall& call, F&& f) {
  with_compute_type(call.dtype, [&](auto tag) {
    with_tcorr_options(call.options_as<TCorrOptions>(), [&](auto variant, auto logits) {
      f(TCorrLoss<decltype(tag), variant.value, logits.value>{});
    });
  });
}

HQOD_MATH_END
