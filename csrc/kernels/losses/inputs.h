// A block of n samples as the loss formulas see it: pairs of boxes, scores, IoUs.
// The CPU's loops hold 64 in arrays, a CUDA thread has one in registers.
#pragma once

#include "math/box_iou.h"

HQOD_MATH_BEGIN

template <typename T, int64_t n>
struct BoxBlock {
  alignas(n > 1 ? 64 : alignof(T)) T x1[n], y1[n], x2[n], y2[n];

  HQOD_HD Box<T> operator[](int64_t i) const { return {x1[i], y1[i], x2[i], y2[i]}; }

  HQOD_HD void set(int64_t i, const Box<T>& box) {
    x1[i] = box.x1;
    y1[i] = box.y1;
    x2[i] = box.x2;
    y2[i] = box.y2;
  }
};

template <typename T, int64_t n>
struct BoxInputs {
  static constexpr bool boxes = true, scores = false, ious = false;
  BoxBlock<T, n> pred, target, d_pred, d_target;

  HQOD_HD Overlap<T> overlap(int64_t i) const { return box_overlap(pred[i], target[i]); }

  // The gradient of the boxes from the gradient g of their IoU.
  template <bool target_grad>
  HQOD_HD void set_grad(int64_t i, const Overlap<T>& o, T g) {
    const Box<T> a = pred[i], b = target[i];
    d_pred.set(i, box_iou_grad(a, b, o, o.w1, o.h1, g));
    if constexpr (target_grad) d_target.set(i, box_iou_grad(b, a, o, o.w2, o.h2, g));
  }
};

template <typename T, int64_t n>
struct ScoreAndIouInputs {
  static constexpr bool boxes = false, scores = true, ious = true;
  alignas(n > 1 ? 64 : alignof(T)) T score[n], iou[n], d_score[n], d_iou[n];
};

template <typename T, int64_t n>
struct BoxAndScoreInputs : BoxInputs<T, n> {
  static constexpr bool scores = true;
  alignas(n > 1 ? 64 : alignof(T)) T score[n], d_score[n];
};

HQOD_MATH_END
