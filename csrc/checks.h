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

inline bool same_shape(const Tensor& x, const Tensor& y) {
  if (x.dim() != y.dim()) return false;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) != y.size(d)) return false;
  }
  return true;
}

inline void check_alike(const char* name, const Tensor& x, const char* other_name,
                        const Tensor& other) {
  STD_TORCH_CHECK(x.scalar_type() == other.scalar_type(), name, ": expected the dtype of ",
                  other_name);
  STD_TORCH_CHECK(x.device() == other.device(), name, ": expected the device of ", other_name);
}

inline void check_boxes(const char* name1, const Tensor& boxes1, const char* name2,
                        const Tensor& boxes2) {
  STD_TORCH_CHECK(boxes1.dim() > 0 && boxes1.size(boxes1.dim() - 1) == 4, name1,
                  ": expected shape [..., 4]");
  STD_TORCH_CHECK(same_shape(boxes1, boxes2), name1, " and ", name2, ": expected one shape");
  check_alike(name2, boxes2, name1, boxes1);
}

// One value a sample: the shape of boxes without its last dimension.
inline void check_per_box(const char* name, const Tensor& x, const Tensor& boxes) {
  bool fits = x.dim() == boxes.dim() - 1;
  for (int64_t d = 0; fits && d < x.dim(); ++d) fits = x.size(d) == boxes.size(d);
  STD_TORCH_CHECK(fits, name, ": expected one value a box");
  STD_TORCH_CHECK(x.device() == boxes.device(), name, ": expected the device of the boxes");
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
