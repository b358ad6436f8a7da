// tcorr_loss.
#include <tuple>

#include "ops/loss.h"

namespace hqod {
namespace {

LossBuilder prepare(const Tensor& scores, const Tensor& ious, const std::optional<Tensor>& weight,
                    bool logits, int64_t variant) {
  LossBuilder b("scores", scores, scores.numel());
  STD_TORCH_CHECK(same_shape(scores, ious), "scores and ious: expected one shape");
  check_alike("ious", ious, "scores", scores);
  b.scores(scores);
  b.ious(ious);
  if (weight.has_value()) {
    STD_TORCH_CHECK(same_shape(scores, *weight), "weight: expected one value a score");
    STD_TORCH_CHECK(weight->device() == scores.device(), "weight: expected the device of scores");
    check_float_beside("weight", *weight, scores);
  }
  b.weight(weight);
  b.tcorr(logits, variant);
  return b;
}

Tensor tcorr_loss(const Tensor& scores,                 // [...]
                  const Tensor& ious,                   // [...]
                  const std::optional<Tensor>& weight,  // [...]
                  bool logits, int64_t variant, int64_t reduction) {
  LossBuilder b = prepare(scores, ious, weight, logits, variant);
  return b.forward(Loss::tcorr, scores, scores.dim(), reduction, std::nullopt);
}

std::tuple<Tensor, Tensor> tcorr_loss_backward(const Tensor& grad,                   // [...] or []
                                               const Tensor& scores,                 // [...]
                                               const Tensor& ious,                   // [...]
                                               const std::optional<Tensor>& weight,  // [...]
                                               bool logits, int64_t variant, int64_t reduction,
                                               int64_t wanted) {
  LossBuilder b = prepare(scores, ious, weight, logits, variant);
  b.upstream(grad, scores, reduction, std::nullopt);
  Tensor d_scores = b.wanted(wanted & kFirst, scores, b.call.d_scores);
  Tensor d_ious = b.wanted(wanted & kSecond, ious, b.call.d_ious);
  b.backward(Loss::tcorr, scores);
  return {d_scores, d_ious};
}

std::tuple<Tensor, Tensor, Tensor> tcorr_loss_and_grad(
    const Tensor& scores,                 // [...]
    const Tensor& ious,                   // [...]
    const std::optional<Tensor>& weight,  // [...]
    bool logits, int64_t variant, int64_t reduction, int64_t wanted) {
  LossBuilder b = prepare(scores, ious, weight, logits, variant);
  Tensor d_scores = b.wanted(wanted & kFirst, scores, b.call.d_scores);
  Tensor d_ious = b.wanted(wanted & kSecond, ious, b.call.d_ious);
  Tensor loss = b.forward_and_backward(Loss::tcorr, scores, reduction, std::nullopt);
  return {loss, d_scores, d_ious};
}

HQOD_LIBRARY_IMPL(m) {
  m.impl("tcorr_loss", TORCH_BOX(&tcorr_loss));
  m.impl("_tcorr_loss_backward", TORCH_BOX(&tcorr_loss_backward));
  m.impl("_tcorr_loss_and_grad", TORCH_BOX(&tcorr_loss_and_grad));
}

}  // namespace
}  // namespace hqod
