// harmonious_iou_loss.
#include <tuple>

#include "ops/loss.h"

namespace hqod {
namespace {

LossBuilder prepare(const Tensor& pred, const Tensor& target, const std::optional<Tensor>& weight,
                    double alpha, double gamma) {
  LossBuilder b("pred", pred, pred.numel() / 4);
  b.boxes("pred", pred, "target", target);
  if (weight.has_value()) {
    check_per_box("weight", *weight, pred);
    check_float_beside("weight", *weight, pred);
  }
  b.weight(weight);
  b.call.alpha = alpha;
  b.call.gamma = gamma;
  return b;
}

Tensor harmonious_iou_loss(const Tensor& pred,                   // [..., 4]
                           const Tensor& target,                 // [..., 4]
                           const std::optional<Tensor>& weight,  // [...]
                           double alpha, double gamma, int64_t reduction) {
  LossBuilder b = prepare(pred, target, weight, alpha, gamma);
  return b.forward(Loss::harmonious_iou, pred, pred.dim() - 1, reduction, std::nullopt);
}

std::tuple<Tensor, Tensor> harmonious_iou_loss_backward(
    const Tensor& grad,                   // [...] or []
    const Tensor& pred,                   // [..., 4]
    const Tensor& target,                 // [..., 4]
    const std::optional<Tensor>& weight,  // [...]
    double alpha, double gamma, int64_t reduction, int64_t wanted) {
  LossBuilder b = prepare(pred, target, weight, alpha, gamma);
  b.upstream(grad, pred, reduction, std::nullopt);
  Tensor d_pred = b.wanted(wanted & kFirst, pred, b.call.d_pred);
  Tensor d_target = b.wanted(wanted & kSecond, target, b.call.d_target);
  b.backward(Loss::harmonious_iou, pred);
  return {d_pred, d_target};
}

std::tuple<Tensor, Tensor, Tensor> harmonious_iou_loss_and_grad(
    const Tensor& pred,                   // [..., 4]
    const Tensor& target,                 // [..., 4]
    const std::optional<Tensor>& weight,  // [...]
    double alpha, double gamma, int64_t reduction, int64_t wanted) {
  LossBuilder b = prepare(pred, target, weight, alpha, gamma);
  Tensor d_pred = b.wanted(wanted & kFirst, pred, b.call.d_pred);
  Tensor d_target = b.wanted(wanted & kSecond, target, b.call.d_target);
  Tensor loss = b.forward_and_backward(Loss::harmonious_iou, pred, reduction, std::nullopt);
  return {loss, d_pred, d_target};
}

HQOD_LIBRARY_IMPL(m) {
  m.impl("harmonious_iou_loss", TORCH_BOX(&harmonious_iou_loss));
  m.impl("_harmonious_iou_loss_backward", TORCH_BOX(&harmonious_iou_loss_backward));
  m.impl("_harmonious_iou_loss_and_grad", TORCH_BOX(&harmonious_iou_loss_and_grad));
}

}  // namespace
}  // namespace hqod
