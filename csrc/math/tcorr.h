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

// A score or an IoU: held to [0, 1], outside of which it has no gradient, unless it is known to be
// inside, up to a rounding.
template <bool inside, typename T>
HQOD_HD T unit_value(T x) {
  return inside ? x : clamp_nan(x, T(0), T(1));
}

template <bool inside, typename T>
HQOD_HD T unit_slope(T x, T slope) {
  return inside || (!(x < T(0)) & !(x > T(1))) ? slope : T(0);
}

// What the loss is made of. A step of its own: see kernels/losses/inputs.h.
template <typename T>
struct TCorrTerms {
  T p;             // the score, inside [0, 1]
  T slope;         // dp / dlogit
  T log_p, log_u;  // log(p + e), log(u + e)
};

inline constexpr double kTCorrEpsilon = 2.220446049250313e-16;

// Of the score itself, or of its logit with the sigmoid fused; iou_inside: of an IoU that was
// computed, not given.
template <bool logits, bool iou_inside, typename T>
HQOD_HD TCorrTerms<T> tcorr_terms(T score, T iou) {
  const T e = static_cast<T>(kTCorrEpsilon), log_u = log_of(unit_value<iou_inside>(iou) + e);
  if constexpr (logits) {
    const Sigmoid<T> s = sigmoid(score);
    return {s.value, s.slope, log_of(s.value + e), log_u};
  } else {
    const T p = unit_value<false>(score);
    return {p, T(1), log_of(p + e), log_u};
  }
}

// From the terms of the same score and iou.
template <TCorrVariant variant, bool logits, bool iou_inside, typename T>
HQOD_HD TCorr<T> tcorr(T score, T iou, const TCorrTerms<T>& terms) {
  const T e = static_cast<T>(kTCorrEpsilon), guard = T(1e-6);
  const T p = terms.p, u = unit_value<iou_inside>(iou);
  const T base_p = (logits ? p : at_least(p, guard)) + e, base_u = at_least(u, guard) + e;
  const T inverse = T(1) / (base_p * base_u);  // one division for both
  const T slope_p = inverse * base_u, slope_u = inverse * base_p;
  const T weight = T(1) + magnitude(p - u);
  T k, dk_dp, dk_du, c;
  if constexpr (variant == TCorrVariant::kOfficial) {
    k = exp_within(u * terms.log_p + p * terms.log_u);
    c = k - e;
    dk_dp = u * slope_p + terms.log_u;
    dk_du = p * slope_u + terms.log_p;
  } else {
    k = exp_within(T(0.5) * (terms.log_p + terms.log_u));
    c = k;
    dk_dp = T(0.5) * slope_p;
    dk_du = T(0.5) * slope_u;
  }
  const T s = exp_within(-c), outer = -weight * s * k, d_p = outer * dk_dp;
  return {weight * (s - T(0.36787944117144233)),
          logits ? d_p * terms.slope : unit_slope<false>(score, d_p),
          unit_slope<iou_inside>(iou, outer * dk_du)};
}

HQOD_MATH_END
