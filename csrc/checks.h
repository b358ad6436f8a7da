// Checks of metadata at the entry of every op, so that no mode skips them. They raise RuntimeError;
// the Python functions check first and name the argument in a ValueError or TypeError.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "kernels/dtype.h"

namespace hqod {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::BFloat16:
      return Dtype::kBfloat16;
    case ScalarType::Half:
      return Dtype::kHalf;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float64, bfloat16 or float16");
  }
}

// The dtype in which a loss is computed and returned.
inline ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Whether the sizes of x are the first dim ones of y.
inline bool starts_alike(const Tensor& x, const Tensor& y, int64_t dim) {
  if (x.dim() != dim) return false;
  for (int64_t d = 0; d < dim; ++d) {
    if (x.size(d) != y.size(d)) return false;
  }
  return true;
}

inline bool same_shape(const Tensor& x, const Tensor& y) { return starts_alike(x, y, y.dim()); }

// An option that is one of so many, counted from 0.
inline int code_of(const char* name, int64_t code, int64_t count) {
  STD_TORCH_CHECK(code >= 0 && code < count, name, ": expected 0 to ", count - 1, ", got ", code);
  return static_cast<int>(code);
}

inline void check_alike(const char* name, const Tensor& x, const char* other_name,
                        const Tensor& other) {
  STD_TORCH_CHECK(x.scalar_type() == other.scalar_type(), name, ": expected the dtype of ",
                  other_name);
  STD_TORCH_CHECK(x.device() == other.device(), name, ": expected the device of ", other_name);
}

// Half samples may come with float weights or scales, but nothing else may mix.
inline void check_float_beside(const char* name, const Tensor& x, const Tensor& other) {
  const bool half =
      other.scalar_type() == ScalarType::Half || other.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(
      x.scalar_type() == other.scalar_type() || (half && x.scalar_type() == ScalarType::Float),
      name, ": expected the dtype of the input, or float32 beside a half one");
}

}  // namespace hqod
