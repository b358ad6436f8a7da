// A run-time Dtype as a C++ type.
#pragma once

#include "kernels/cpu/convert.h"
#include "kernels/dtype.h"

HQOD_MATH_BEGIN

// Calls f with a value of the type that a Dtype names.
template <typename F>
HQOD_HD void with_type(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float{});
    case Dtype::kFloat64:
      return f(double{});
    case Dtype::kBfloat16:
      return f(Bfloat16{});
    case Dtype::kHalf:
      return f(Half{});
  }
}

HQOD_MATH_END
