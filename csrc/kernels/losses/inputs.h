// A block of n samples as the loss formulas see it: pairs of boxes, scores, IoUs, and what is
// computed of them. The CPU's loops hold 64 in arrays, a CUDA thread has one in registers.
//
// A formula works in stages, each a loop of its own over the block: a processor has several turns
// of a short loop in flight, where those of a long one wait for a chain of logarithms and
// exponentials. Each is formula.stage<k, grad>(inputs, i), k from 0 to Formula::kStages - 1. They
// leave the loss, and with grad its slopes in the IoU and the score, from which
// inputs.finish<target_grad>(i, g) makes the gradients.
#pragma once

#include "math/box_iou.h"
#include "math/tcorr.h"

#define HQOD_BLOCK alignas(n > 1 ? 64 : alignof(T)) T

HQOD_MATH_BEGIN

template <typename T, int64_t n>
struct BoxBlock {
  HQOD_BLOCK x1[n], y1[n], x2[n], y2[n];

  HQOD_HD Box<T> operator[](int64_t i) const { return {x1[i], y1[i], x2[i], y2[i]}; }

  HQOD_HD void set(int64_t i, const Box<T>& box) {
    x1[i] = box.x1;
    y1[i] = box.y1;
    x2[i] = box.x2;
    y2[i] = box.y2;
  }
};

// Overlaps, but for the IoU.
template <typename T, int64_t n>
struct OverlapBlock {
  HQOD_BLOCK w1[n], h1[n], w2[n], h2[n], wi[n], hi[n], per_union[n], union_share[n];

  HQOD_HD void set(int64_t i, const Overlap<T>& o) {
    w1[i] = o.w1;
    h1[i] = o.h1;
    w2[i] = o.w2;
    h2[i] = o.h2;
    wi[i] = o.wi;
    hi[i] = o.hi;
    per_union[i] = o.per_union;
    union_share[i] = o.union_share;
  }

  HQOD_HD Overlap<T> with_iou(int64_t i, T iou) const {
    return {{w1[i], h1[i], w2[i], h2[i], wi[i], hi[i]}, iou, per_union[i], union_share[i]};
  }
};

// What every loss has: an IoU, given or computed, and what its formula makes of it.
template <typename T, int64_t n>
struct LossBlock {
  HQOD_BLOCK iou[n], loss[n], d_iou[n];
};

template <typename T, int64_t n>
struct BoxInputs : LossBlock<T, n> {
  static constexpr bool boxes = true, scores = false, ious = false;
  BoxBlock<T, n> pred, target, d_pred, d_target;
  OverlapBlock<T, n> overlap;

  template <bool grad>
  HQOD_HD void set_overlap(int64_t i) {
    const Overlap<T> o = box_overlap(pred[i], target[i]);
    this->iou[i] = o.iou;
    if constexpr (grad) overlap.set(i, o);
  }

  template <bool target_grad>
  HQOD_HD void finish(int64_t i, T g) {
    const Overlap<T> o = overlap.with_iou(i, this->iou[i]);
    const Box<T> a = pred[i], b = target[i];
    g *= this->d_iou[i];
    d_pred.set(i, box_iou_grad(a, b, o, o.w1, o.h1, g));
    if constexpr (target_grad) d_target.set(i, box_iou_grad(b, a, o, o.w2, o.h2, g));
  }
};

template <typename T, int64_t n>
struct ScoreBlock {
  HQOD_BLOCK score[n], d_score[n];
  HQOD_BLOCK p[n], slope[n], log_p[n], log_u[n];  // TCorrTerms

  HQOD_HD void set(int64_t i, const TCorrTerms<T>& t) {
    p[i] = t.p;
    slope[i] = t.slope;
    log_p[i] = t.log_p;
    log_u[i] = t.log_u;
  }

  HQOD_HD TCorrTerms<T> terms(int64_t i) const { return {p[i], slope[i], log_p[i], log_u[i]}; }
};

template <typename T, int64_t n>
struct ScoreAndIouInputs : LossBlock<T, n>, ScoreBlock<T, n> {
  static constexpr bool boxes = false, scores = true, ious = true;

  template <bool>
  HQOD_HD void finish(int64_t i, T g) {
    this->d_score[i] *= g;
    this->d_iou[i] *= g;
  }
};

template <typename T, int64_t n>
struct BoxAndScoreInputs : BoxInputs<T, n>, ScoreBlock<T, n> {
  static constexpr bool scores = true;

  template <bool target_grad>
  HQOD_HD void finish(int64_t i, T g) {
    this->d_score[i] *= g;
    BoxInputs<T, n>::template finish<target_grad>(i, g);
  }
};

// All stages over the first `count` samples of a block.
template <bool grad, int stage = 0, typename Formula, typename Inputs>
HQOD_HD void run_stages(const Formula& formula, Inputs& in, int64_t count) {
  if constexpr (stage < Formula::kStages) {
    for (int64_t i = 0; i < count; ++i) formula.template stage<stage, grad>(in, i);
    run_stages<grad, stage + 1>(formula, in, count);
  }
}

HQOD_MATH_END
