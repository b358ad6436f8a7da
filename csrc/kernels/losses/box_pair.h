// The losses of math/box_pair.h over blocks of samples: each is a rule, a class with of(BoxPair).
#pragma once

#include "kernels/loss_call.h"
#include "kernels/losses/inputs.h"
#include "math/box_pair.h"

namespace hqod {

struct BoxPairOptions {
  double eps;
};

}  // namespace hqod

HQOD_MATH_BEGIN

// No functions of the IoU: their slopes are what they leave for finish().
template <typename T, int64_t n>
struct BoxPairInputs {
  static constexpr bool boxes = true, scores = false, ious = false;
  BoxBlock<T, n> pred, target, d_pred, d_target;
  HQOD_BLOCK loss[n], inter[n], area[n], dx[n], dy[n], hull_w[n], hull_h[n], w1[n], h1[n], w2[n],
      h2[n], shrink[n];

  HQOD_HD void set(int64_t i, const PairSlopes<T>& d) {
    inter[i] = d.inter;
    area[i] = d.area;
    dx[i] = d.dx;
    dy[i] = d.dy;
    hull_w[i] = d.hull_w;
    hull_h[i] = d.hull_h;
    w1[i] = d.w1;
    h1[i] = d.h1;
    w2[i] = d.w2;
    h2[i] = d.h2;
    shrink[i] = d.shrink;
  }

  template <bool target_grad>
  HQOD_HD void finish(int64_t i, T g) {
    const PairSlopes<T> d{inter[i], area[i], dx[i], dy[i], hull_w[i], hull_h[i],
                          w1[i],    h1[i],   w2[i], h2[i], shrink[i]};
    const Box<T> a = pred[i], b = target[i];
    d_pred.set(i, pair_grad(a, b, d, d.w1, d.h1, T(1), g));
    if constexpr (target_grad) d_target.set(i, pair_grad(b, a, d, d.w2, d.h2, T(-1), g));
  }
};

template <typename Rule, typename T>
struct BoxPairLoss {
  using Type = T;
  template <int64_t n>
  using Inputs = BoxPairInputs<T, n>;
  static constexpr int kStages = 1;
  T eps;

  template <int, bool grad, int64_t n>
  HQOD_HD void stage(BoxPairInputs<T, n>& in, int64_t i) const {
    const PairLoss<T> v = Rule::of(box_pair(in.pred[i], in.target[i], eps));
    in.loss[i] = v.loss;
    if constexpr (grad) in.set(i, v.slope);
  }
};

template <typename Rule, typename F>
void with_box_pair(const LossCall& call, F&& f) {
  const auto& options = call.options_as<BoxPairOptions>();
  with_compute_type(call.dtype, [&](auto tag) {
    using T = decltype(tag);
    f(BoxPairLoss<Rule, T>{static_cast<T>(options.eps)});
  });
}

HQOD_MATH_END
