// A block of samples as the loss formulas see it: a pair of boxes and a pair of score and IoU.
#pragma once

#include "kernels/cpu/loss_loop.h"

HQOD_MATH_BEGIN

template <typename T, bool target_grad>
struct BoxInputs {
  BoxBlock<T> pred, target, d_pred, d_target;

  HQOD_HD void load_from(const LossCall& call, int64_t start, int64_t n) {
    pred.load_from(call.dtype, call.pred, start, n);
    target.load_from(call.dtype, call.target, start, n);
  }

  HQOD_HD void store_to(const LossCall& call, int64_t start, int64_t n) const {
    if (call.d_pred != nullptr) d_pred.store_to(call.dtype, call.d_pred, start, n);
    if constexpr (target_grad) d_target.store_to(call.dtype, call.d_target, start, n);
  }

  HQOD_HD Overlap<T> overlap(int64_t i) const { return box_overlap(pred[i], target[i]); }

  // The gradient of both boxes from the gradient g of their IoU.
  HQOD_HD void set_grad(int64_t i, const Overlap<T>& o, T g) {
    const Box<T> a = pred[i], b = target[i];
    d_pred.set(i, box_iou_grad(a, b, o, o.w1, o.h1, g));
    if constexpr (target_grad) d_target.set(i, box_iou_grad(b, a, o, o.w2, o.h2, g));
  }
};

template <typename T>
struct ScoreInputs {
  alignas(64) T score[kBlock], iou[kBlock], d_score[kBlock], d_iou[kBlock];

  HQOD_HD void load_from(const LossCall& call, int64_t start, int64_t n) {
    load_values(call.dtype, call.scores, start, n, score);
    if (call.ious != nullptr) load_values(call.dtype, call.ious, start, n, iou);
  }

  HQOD_HD void store_to(const LossCall& call, int64_t start, int64_t n) const {
    if (call.d_scores != nullptr) store_values(call.dtype, d_score, call.d_scores, start, n);
    if (call.d_ious != nullptr) store_values(call.dtype, d_iou, call.d_ious, start, n);
  }
};

HQOD_MATH_END
