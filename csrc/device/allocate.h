// New tensors, without a trip through the dispatcher.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "checks.h"

namespace hqod {

inline Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim,
                            ScalarType type, const Tensor& like) {
  int32_t device_type = 0, device_index = 0;
  const bool known = aoti_torch_get_device_type(like.get(), &device_type) == AOTI_TORCH_SUCCESS &&
                     aoti_torch_get_device_index(like.get(), &device_index) == AOTI_TORCH_SUCCESS;
  STD_TORCH_CHECK(known, "no device of a tensor");
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  const auto status =
      aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, device_index, &handle);
  STD_TORCH_CHECK(status == AOTI_TORCH_SUCCESS, "no memory for a result");
  return Tensor(handle);
}

// Contiguous, with the first dim sizes of a tensor.
inline Tensor empty_contiguous(const Tensor& like, int64_t dim, ScalarType type) {
  constexpr int64_t kInline = 8;
  int64_t inline_strides[kInline] = {};
  std::vector<int64_t> more(dim > kInline ? dim : 0);
  int64_t* strides = dim > kInline ? more.data() : inline_strides;
  const auto sizes = like.sizes();
  int64_t stride = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  return empty_strided(sizes.data(), strides, dim, type, like);
}

// The gradient of an input that wants none.
inline Tensor no_gradient(const Tensor& like) {
  const int64_t size = 0, stride = 1;
  return empty_strided(&size, &stride, 1, like.scalar_type(), like);
}

// The gradient of an input, contiguous, and where a kernel writes it.
inline Tensor new_gradient(bool is_wanted, const Tensor& input, void*& data) {
  if (!is_wanted) return no_gradient(input);
  Tensor gradient = empty_contiguous(input, input.dim(), input.scalar_type());
  data = gradient.mutable_data_ptr();
  return gradient;
}

}  // namespace hqod
