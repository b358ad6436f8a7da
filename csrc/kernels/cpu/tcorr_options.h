// TCorr's run-time options as compile-time constants.
#pragma once

#include "kernels/loss_call.h"
#include "math/tcorr.h"

HQOD_MATH_BEGIN

template <auto v>
struct Constant {
  HQOD_HD constexpr operator decltype(v)() const { return v; }
};

// Calls f(variant, logits) with constants.
template <typename F>
HQOD_HD void with_tcorr_options(const LossCall& call, F&& f) {
  const bool geometric = call.variant == static_cast<int>(TCorrVariant::kGeometric);
  if (geometric && call.logits) return f(Constant<TCorrVariant::kGeometric>{}, Constant<true>{});
  if (geometric) return f(Constant<TCorrVariant::kGeometric>{}, Constant<false>{});
  if (call.logits) return f(Constant<TCorrVariant::kOfficial>{}, Constant<true>{});
  return f(Constant<TCorrVariant::kOfficial>{}, Constant<false>{});
}

HQOD_MATH_END
