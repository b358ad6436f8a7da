#include "ops/loss.h"

#include "device/allocate.h"

namespace hqod {

LossBuilder::LossBuilder(Loss loss, const LossInput* inputs,
                         std::initializer_list<const Tensor*> tensors, const void* options,
                         const Reducing& how)
    : loss_(loss), inputs_(inputs), reduction_(code_of("reduction", how.reduction, 3)) {
  const Tensor& first = **tensors.begin();
  const int64_t boxes = inputs[0].is_box ? 1 : 0, dim = first.dim();
  STD_TORCH_CHECK(!boxes || (dim > 0 && first.size(dim - 1) == 4), inputs[0].name,
                  ": expected shape [..., 4]");
  dim_ = dim - boxes;
  call_.dtype = dtype_of(inputs[0].name, first);
  call_.count = boxes ? first.numel() / 4 : first.numel();
  call_.options = options;
  size_t i = 0;
  for (const Tensor* x : tensors) {
    const LossInput& input = inputs[i];
    tensors_[i++] = x;
    STD_TORCH_CHECK(starts_alike(*x, first, input.is_box ? dim : dim_), input.name, ": expected ",
                    input.is_box ? "the shape" : "one value a sample", " of ", inputs[0].name);
    check_alike(input.name, *x, inputs[0].name, first);
    call_.*input.data = keep(*x);
  }
  if (reduction_ == kMean && call_.count != 0) {
    call_.factor = 1.0 / how.avg_factor.value_or(static_cast<double>(call_.count));
  }
}

void LossBuilder::weight(const std::optional<Tensor>& weight) {
  if (!weight.has_value()) return;
  const Tensor& first = *tensors_[0];
  STD_TORCH_CHECK(is_one_a_sample(*weight), "weight: expected one value a sample of ",
                  inputs_[0].name);
  STD_TORCH_CHECK(weight->device() == first.device(), "weight: expected the device of ",
                  inputs_[0].name);
  check_float_beside("weight", *weight, first);
  call_.weight_dtype = dtype_of("weight", *weight);
  call_.weight = keep(*weight);
}

const void* LossBuilder::keep(const Tensor& x) {
  if (x.is_contiguous()) return x.const_data_ptr();
  kept_[kept_count_] = torch::stable::contiguous(x);
  return kept_[kept_count_++]->const_data_ptr();
}

Tensor LossBuilder::forward() {
  const Tensor& like = *tensors_[0];
  const bool reduced = reduction_ != kNone;
  Tensor result = empty_contiguous(like, reduced ? 0 : dim_, compute_type(like));
  (reduced ? call_.total : call_.loss) = result.mutable_data_ptr();
  run_loss_forward(loss_, call_, like);
  return result;
}

Tensor LossBuilder::forward_and_backward() {
  const Tensor& like = *tensors_[0];
  STD_TORCH_CHECK(reduction_ != kNone, "reduction: expected 1 (mean) or 2 (sum)");
  Tensor result = empty_contiguous(like, 0, compute_type(like));
  call_.total = result.mutable_data_ptr();
  run_loss_backward(loss_, call_, like);
  return result;
}

void LossBuilder::upstream(const Tensor& grad) {
  const Tensor& like = *tensors_[0];
  STD_TORCH_CHECK(grad.scalar_type() == compute_type(like), "grad: expected the dtype of the loss");
  STD_TORCH_CHECK(grad.device() == like.device(), "grad: expected the device of the inputs");
  bool one_value = grad.numel() > 0;
  for (int64_t d = 0; d < grad.dim(); ++d) one_value &= grad.stride(d) == 0 || grad.size(d) == 1;
  STD_TORCH_CHECK(grad.numel() == (reduction_ == kNone ? call_.count : 1),
                  "grad: expected the shape of the loss");
  call_.grad_is_scalar = one_value;  // a reduced loss, or an expanded gradient
  call_.grad = one_value ? grad.const_data_ptr() : keep(grad);
}

Tensor LossBuilder::gradient(size_t input, int64_t wanted) {
  return new_gradient(wanted >> input & 1, *tensors_[input], call_.*inputs_[input].gradient);
}

void LossBuilder::backward() {
  if (call_.d_pred || call_.d_target || call_.d_scores || call_.d_ious) {
    run_loss_backward(loss_, call_, *tensors_[0]);
  }
}

}  // namespace hqod
