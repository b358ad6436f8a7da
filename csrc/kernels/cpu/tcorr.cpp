#include "math/tcorr.h"

#include "kernels/cpu/loss_inputs.h"
#include "kernels/cpu/losses.h"
#include "kernels/cpu/tcorr_options.h"

HQOD_MATH_BEGIN

template <typename T, TCorrVariant variant, bool logits>
struct TCorrLoss {
  using Type = T;
  using Inputs = ScoreInputs<T>;

  explicit TCorrLoss(const LossCall&) {}

  HQOD_HD T loss(const Inputs& in, int64_t i) const {
    return tcorr<T, variant, logits>(in.score[i], in.iou[i]).loss;
  }

  HQOD_HD T grad(Inputs& in, int64_t i, T g) const {
    const TCorr<T> t = tcorr<T, variant, logits>(in.score[i], in.iou[i]);
    in.d_score[i] = g * t.d_score;
    in.d_iou[i] = g * t.d_iou;
    return t.loss;
  }
};

HQOD_MATH_END

namespace hqod {

void HQOD_KERNEL_NAME(tcorr_forward)(const LossCall& call, int64_t begin, int64_t end) {
  with_compute_type(call.dtype, [&](auto tag) {
    using T = decltype(tag);
    with_tcorr_options(call, [&](auto variant, auto logits) {
      loss_forward<TCorrLoss<T, variant, logits>>(call, begin, end);
    });
  });
}

void HQOD_KERNEL_NAME(tcorr_backward)(const LossCall& call, int64_t begin, int64_t end) {
  with_compute_type(call.dtype, [&](auto tag) {
    using T = decltype(tag);
    with_tcorr_options(call, [&](auto variant, auto logits) {
      loss_backward<TCorrLoss<T, variant, logits>>(call, begin, end);
    });
  });
}

}  // namespace hqod
