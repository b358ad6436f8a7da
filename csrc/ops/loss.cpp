#include "ops/loss.h"

#include "ops/allocate.h"

namespace hqod {

LossBuilder::LossBuilder(const char* op, const Tensor& like, int64_t count) {
  call.dtype = dtype_of(op, like);
  call.count = count;
}

const void* LossBuilder::keep(const Tensor& x) {
  if (x.is_contiguous()) return x.const_data_ptr();
  kept_[kept_count_] = torch::stable::contiguous(x);
  return kept_[kept_count_++]->const_data_ptr();
}

void LossBuilder::boxes(const char* name1, const Tensor& boxes1, const char* name2,
                        const Tensor& boxes2) {
  check_boxes(name1, boxes1, name2, boxes2);
  call.pred = keep(boxes1);
  call.target = keep(boxes2);
}

void LossBuilder::scores(const Tensor& scores) { call.scores = keep(scores); }

void LossBuilder::ious(const Tensor& ious) { call.ious = keep(ious); }

void LossBuilder::weight(const std::optional<Tensor>& weight) {
  if (!weight.has_value()) return;
  call.weight_dtype = dtype_of("weight", *weight);
  call.weight = keep(*weight);
}

double LossBuilder::factor(int64_t reduction, std::optional<double> avg_factor) const {
  if (reduction != static_cast<int64_t>(Reduction::kMean) || call.count == 0) return 1.0;
  return 1.0 / avg_factor.value_or(static_cast<double>(call.count));
}

void LossBuilder::tcorr(bool logits, int64_t variant) {
  STD_TORCH_CHECK(variant == 0 || variant == 1, "variant: expected 0 (official) or 1 (geometric)");
  call.logits = logits;
  call.variant = static_cast<int>(variant);
}

Tensor LossBuilder::forward(Loss loss, const Tensor& like, int64_t dim, int64_t reduction,
                            std::optional<double> avg_factor) {
  STD_TORCH_CHECK(reduction >= 0 && reduction <= 2, "reduction: expected 0 (none), 1 or 2");
  const bool reduced = reduction != static_cast<int64_t>(Reduction::kNone);
  Tensor result = empty_contiguous(like, reduced ? 0 : dim, compute_type(like));
  (reduced ? call.total : call.loss) = result.mutable_data_ptr();
  call.factor = factor(reduction, avg_factor);
  run_loss_forward(loss, call, like);
  return result;
}

Tensor LossBuilder::forward_and_backward(Loss loss, const Tensor& like, int64_t reduction,
                                         std::optional<double> avg_factor) {
  STD_TORCH_CHECK(reduction == 1 || reduction == 2, "reduction: expected 1 (mean) or 2 (sum)");
  Tensor result = empty_contiguous(like, 0, compute_type(like));
  call.total = result.mutable_data_ptr();
  call.factor = factor(reduction, avg_factor);
  run_loss_backward(loss, call, like);
  return result;
}

void LossBuilder::upstream(const Tensor& grad, const Tensor& like, int64_t reduction,
                           std::optional<double> avg_factor) {
  const ScalarType type = call.dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(reduction >= 0 && reduction <= 2, "reduction: expected 0 (none), 1 or 2");
  STD_TORCH_CHECK(grad.scalar_type() == type, "grad: expected the dtype of the loss");
  STD_TORCH_CHECK(grad.device() == like.device(), "grad: expected the device of the inputs");
  bool one_value = grad.numel() > 0;
  for (int64_t d = 0; d < grad.dim(); ++d) one_value &= grad.stride(d) == 0 || grad.size(d) == 1;
  const int64_t expected = reduction == static_cast<int64_t>(Reduction::kNone) ? call.count : 1;
  STD_TORCH_CHECK(grad.numel() == expected, "grad: expected the shape of the loss");
  call.grad_is_scalar = one_value;  // a reduced loss, or an expanded gradient
  call.grad = one_value ? grad.const_data_ptr() : keep(grad);
  call.factor = factor(reduction, avg_factor);
}

Tensor LossBuilder::wanted(bool is_wanted, const Tensor& input, void*& data) {
  if (!is_wanted) return no_gradient(input);
  Tensor gradient = empty_contiguous(input, input.dim(), input.scalar_type());
  data = gradient.mutable_data_ptr();
  return gradient;
}

void LossBuilder::backward(Loss loss, const Tensor& like) {
  if (call.d_pred || call.d_target || call.d_scores || call.d_ious) {
    run_loss_backward(loss, call, like);
  }
}

}  // namespace hqod
