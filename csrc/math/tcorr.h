// Task-correlation loss of a score p and an IoU u, and its gradient.
//
//   L = (1 + |p - u|) (exp(-C) - exp(-1)),  |p - u| a constant
//   official:  C = K - e, K = (p + e)^u (u + e)^p
//   geometric: C = K = sqrt((p + e)(u + e))
//   dL/dx = -(1 + |p - u|) exp(-C) dK/dx
//
// e is the float64 epsilon, as published. The derivative of log(x + e) is held at 1e6 for x < 1e-6,
// where the published one reaches 5e13; a logit needs no such guard, since its p (1 - p) cancels
// it.
//
// Source: HQOD (arXiv:2408.02561).
#pragma once

#include "math/elementary.h"

HQOD_MATH_BEGIN

enum class TCorrVariant { kOfficial = 0, kGeometric = 1 };

template <typename T>
struct TCorr {
  T loss, d_score, d_iou;
};

template <typename T, TCorrVariant variant>
HQOD_HD TCorr<T> tcorr_of_score(T score, T iou, T score_guard) {
  const T e = T(2.220446049250313e-16), guard = T(1e-6);
  const T p = clamp_nan(score, T(0), T(1)), u = clamp_nan(iou, T(0), T(1));
  const T log_p = log_of(p + e), log_u = log_of(u + e);
  const T slope_p = T(1) / (at_least(p, score_guard) + e),
          slope_u = T(1) / (at_least(u, guard) + e);
  const T weight = T(1) + (p < u ? u - p : p - u);
  T k, dk_dp, dk_du, c;
  if constexpr (variant == TCorrVariant::kOfficial) {
    k = exp_of(u * log_p + p * log_u);
    c = k - e;
    dk_dp = u * slope_p + log_u;
    dk_du = p * slope_u + log_p;
  } else {
    k = exp_of(T(0.5) * (log_p + log_u));
    c = k;
    dk_dp = T(0.5) * slope_p;
    dk_du = T(0.5) * slope_u;
  }
  const T s = exp_of(-c), outer = -weight * s * k;
  const bool p_free = !(score < T(0)) && !(score > T(1));
  const bool u_free = !(iou < T(0)) && !(iou > T(1));
  return {weight * (s - T(0.36787944117144233)), p_free ? outer * dk_dp : T(0),
          u_free ? outer * dk_du : T(0)};
}

// The score itself, or its logit with the sigmoid fused.
template <typename T, TCorrVariant variant, bool logits>
HQOD_HD TCorr<T> tcorr(T score, T iou) {
  if constexpr (logits) {
    const Sigmoid<T> p = sigmoid(score);
    TCorr<T> t = tcorr_of_score<T, variant>(p.value, iou, T(0));
    t.d_score *= p.slope;
    return t;
  } else {
    return tcorr_of_score<T, variant>(score, iou, T(1e-6));
  }
}

HQOD_MATH_END
