// hqod_loss.
#include <tuple>

#include "ops/loss.h"

namespace hqod {
namespace {

LossBuilder prepare(const Tensor& pred, const Tensor& target, const Tensor& scores,
                    const std::optional<Tensor>& weight, bool logits, int64_t variant, double alpha,
                    double gamma, double hiou_weight, double tcorr_weight) {
  LossBuilder b("pred", pred, pred.numel() / 4);
  b.boxes("pred", pred, "target", target);
  check_per_box("scores", scores, pred);
  check_alike("scores", scores, "pred", pred);
  b.scores(scores);
  if (weight.has_value()) {
    check_per_box("weight", *weight, pred);
    check_float_beside("weight", *weight, pred);
  }
  b.weight(weight);
  b.tcorr(logits, variant);
  b.call.alpha = alpha;
  b.call.gamma = gamma;
  b.call.hiou_weight = hiou_weight;
  b.call.tcorr_weight = tcorr_weight;
  return b;
}

Tensor hqod_loss(const Tensor& pred,                   // [..., 4]
                 const Tensor& target,                 // [..., 4]
                 const Tensor& scores,                 // [...]
                 const std::optional<Tensor>& weight,  // [...]
                 bool logits, int64_t variant, double alpha, double gamma, double hiou_weight,
                 double tcorr_weight, int64_t reduction, std::optional<double> avg_factor) {
  LossBuilder b = prepare(pred, target, scores, weight, logits, variant, alpha, gamma, hiou_weight,
                          tcorr_weight);
  return b.forward(Loss::hqod, pred, pred.dim() - 1, reduction, avg_factor);
}

std::tuple<Tensor, Tensor, Tensor> hqod_loss_backward(const Tensor& grad,    // [...] or []
                                                      const Tensor& pred,    // [..., 4]
                                                      const Tensor& target,  // [..., 4]
                                                      const Tensor& scores,  // [...]
                                                      const std::optional<Tensor>& weight,  // [...]
                                                      bool logits, int64_t variant, double alpha,
                                                      double gamma, double hiou_weight,
                                                      double tcorr_weight, int64_t reduction,
                                                      std::optional<double> avg_factor,
                                                      int64_t wanted) {
  LossBuilder b = prepare(pred, target, scores, weight, logits, variant, alpha, gamma, hiou_weight,
                          tcorr_weight);
  b.upstream(grad, pred, reduction, avg_factor);
  Tensor d_pred = b.wanted(wanted & kFirst, pred, b.call.d_pred);
  Tensor d_target = b.wanted(wanted & kSecond, target, b.call.d_target);
  Tensor d_scores = b.wanted(wanted & kThird, scores, b.call.d_scores);
  b.backward(Loss::hqod, pred);
  return {d_pred, d_target, d_scores};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> hqod_loss_and_grad(
    const Tensor& pred,                   // [..., 4]
    const Tensor& target,                 // [..., 4]
    const Tensor& scores,                 // [...]
    const std::optional<Tensor>& weight,  // [...]
    bool logits, int64_t variant, double alpha, double gamma, double hiou_weight,
    double tcorr_weight, int64_t reduction, std::optional<double> avg_factor, int64_t wanted) {
  LossBuilder b = prepare(pred, target, scores, weight, logits, variant, alpha, gamma, hiou_weight,
                          tcorr_weight);
  Tensor d_pred = b.wanted(wanted & kFirst, pred, b.call.d_pred);
  Tensor d_target = b.wanted(wanted & kSecond, target, b.call.d_target);
  Tensor d_scores = b.wanted(wanted & kThird, scores, b.call.d_scores);
  Tensor loss = b.forward_and_backward(Loss::hqod, pred, reduction, avg_factor);
  return {loss, d_pred, d_target, d_scores};
}

HQOD_LIBRARY_IMPL(m) {
  m.impl("hqod_loss", TORCH_BOX(&hqod_loss));
  m.impl("_hqod_loss_backward", TORCH_BOX(&hqod_loss_backward));
  m.impl("_hqod_loss_and_grad", TORCH_BOX(&hqod_loss_and_grad));
}

}  // namespace
}  // namespace hqod
