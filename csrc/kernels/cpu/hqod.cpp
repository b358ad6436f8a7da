#include "kernels/cpu/loss_inputs.h"
#include "kernels/cpu/losses.h"
#include "kernels/cpu/tcorr_options.h"
#include "math/harmonious_iou.h"
#include "math/tcorr.h"

HQOD_MATH_BEGIN

template <typename T, bool target_grad>
struct BoxAndScoreInputs {
  BoxInputs<T, target_grad> boxes;
  ScoreInputs<T> scores;

  HQOD_HD void load_from(const LossCall& call, int64_t start, int64_t n) {
    boxes.load_from(call, start, n);
    scores.load_from(call, start, n);
  }

  HQOD_HD void store_to(const LossCall& call, int64_t start, int64_t n) const {
    boxes.store_to(call, start, n);
    scores.store_to(call, start, n);
  }
};

template <typename T, TCorrVariant variant, bool logits, bool target_grad>
struct HqodLoss {
  using Type = T;
  using Inputs = BoxAndScoreInputs<T, target_grad>;
  T alpha, gamma, hiou_weight, tcorr_weight;

  explicit HqodLoss(const LossCall& call)
      : alpha(static_cast<T>(call.alpha)),
        gamma(static_cast<T>(call.gamma)),
        hiou_weight(static_cast<T>(call.hiou_weight)),
        tcorr_weight(static_cast<T>(call.tcorr_weight)) {}

  HQOD_HD T loss(const Inputs& in, int64_t i) const {
    const T iou = in.boxes.overlap(i).iou;
    return hiou_weight * harmonious_iou(iou, alpha, gamma).loss +
           tcorr_weight * tcorr<T, variant, logits>(in.scores.score[i], iou).loss;
  }

  HQOD_HD T grad(Inputs& in, int64_t i, T g) const {
    const Overlap<T> o = in.boxes.overlap(i);
    const TCorr<T> t = tcorr<T, variant, logits>(in.scores.score[i], o.iou);
    const HarmoniousIoU<T> h = harmonious_iou(o.iou, alpha, gamma);
    in.boxes.set_grad(i, o, g * (hiou_weight * h.slope + tcorr_weight * t.d_iou));
    in.scores.d_score[i] = g * tcorr_weight * t.d_score;
    return hiou_weight * h.loss + tcorr_weight * t.loss;
  }
};

HQOD_MATH_END

namespace hqod {

void HQOD_KERNEL_NAME(hqod_forward)(const LossCall& call, int64_t begin, int64_t end) {
  with_compute_type(call.dtype, [&](auto tag) {
    using T = decltype(tag);
    with_tcorr_options(call, [&](auto variant, auto logits) {
      loss_forward<HqodLoss<T, variant, logits, false>>(call, begin, end);
    });
  });
}

void HQOD_KERNEL_NAME(hqod_backward)(const LossCall& call, int64_t begin, int64_t end) {
  with_compute_type(call.dtype, [&](auto tag) {
    using T = decltype(tag);
    with_tcorr_options(call, [&](auto variant, auto logits) {
      if (call.d_target != nullptr) {
        loss_backward<HqodLoss<T, variant, logits, true>>(call, begin, end);
      } else {
        loss_backward<HqodLoss<T, variant, logits, false>>(call, begin, end);
      }
    });
  });
}

}  // namespace hqod
