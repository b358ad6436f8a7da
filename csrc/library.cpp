// Every op's schema on one page. Reductions are 0 none, 1 mean, 2 sum; variants as in math/tcorr.h;
// `wanted` has bit i set when input i's gradient is asked for, the others come back empty. An op
// `_<loss>_and_grad` returns a reduced loss with its gradients, all from one pass.
#include <torch/csrc/stable/library.h>

#include "kernels/cpu/isa.h"

STABLE_TORCH_LIBRARY(hqod, m) {
  m.def("_cpu_isa() -> int");

  m.def("aligned_box_iou(Tensor boxes1, Tensor boxes2) -> Tensor");
  m.def(
      "_aligned_box_iou_backward(Tensor grad, Tensor boxes1, Tensor boxes2, int wanted) "
      "-> (Tensor, Tensor)");

  m.def(
      "harmonious_iou_loss(Tensor pred, Tensor target, Tensor? weight, float alpha, float gamma, "
      "int reduction) -> Tensor");
  m.def(
      "_harmonious_iou_loss_backward(Tensor grad, Tensor pred, Tensor target, Tensor? weight, "
      "float alpha, float gamma, int reduction, int wanted) -> (Tensor, Tensor)");

  m.def(
      "_harmonious_iou_loss_and_grad(Tensor pred, Tensor target, Tensor? weight, float alpha, "
      "float gamma, int reduction, int wanted) -> (Tensor, Tensor, Tensor)");

  m.def(
      "tcorr_loss(Tensor scores, Tensor ious, Tensor? weight, bool logits, int variant, "
      "int reduction) -> Tensor");
  m.def(
      "_tcorr_loss_backward(Tensor grad, Tensor scores, Tensor ious, Tensor? weight, bool logits, "
      "int variant, int reduction, int wanted) -> (Tensor, Tensor)");

  m.def(
      "_tcorr_loss_and_grad(Tensor scores, Tensor ious, Tensor? weight, bool logits, int variant, "
      "int reduction, int wanted) -> (Tensor, Tensor, Tensor)");

  m.def(
      "hqod_loss(Tensor pred, Tensor target, Tensor scores, Tensor? weight, bool logits, "
      "int variant, float alpha, float gamma, float hiou_weight, float tcorr_weight, "
      "int reduction, float? avg_factor) -> Tensor");
  m.def(
      "_hqod_loss_backward(Tensor grad, Tensor pred, Tensor target, Tensor scores, Tensor? weight, "
      "bool logits, int variant, float alpha, float gamma, float hiou_weight, float tcorr_weight, "
      "int reduction, float? avg_factor, int wanted) -> (Tensor, Tensor, Tensor)");

  m.def(
      "_hqod_loss_and_grad(Tensor pred, Tensor target, Tensor scores, Tensor? weight, bool logits, "
      "int variant, float alpha, float gamma, float hiou_weight, float tcorr_weight, "
      "int reduction, float? avg_factor, int wanted) -> (Tensor, Tensor, Tensor, Tensor)");

  m.def(
      "fake_quant(Tensor x, Tensor scale, Tensor? zero_point, int quant_min, int quant_max, "
      "int? ch_axis, float grad_scale, bool lsq_grad_scale, int activation) -> Tensor");
  m.def(
      "_fake_quant_backward(Tensor grad, Tensor x, Tensor scale, Tensor? zero_point, "
      "int quant_min, int quant_max, int? ch_axis, float grad_scale, bool lsq_grad_scale, "
      "int activation, int wanted) -> (Tensor, Tensor, Tensor)");
  m.def(
      "fake_quant_foreach(Tensor[] xs, Tensor[] scales, Tensor[] zero_points, int[] quant_min, "
      "int[] quant_max, int? ch_axis, float grad_scale, bool lsq_grad_scale) -> Tensor[]");
  m.def(
      "_fake_quant_foreach_backward(Tensor[] grads, Tensor[] xs, Tensor[] scales, "
      "Tensor[] zero_points, int[] quant_min, int[] quant_max, int? ch_axis, float grad_scale, "
      "bool lsq_grad_scale, int wanted) -> (Tensor[], Tensor[], Tensor[])");
}

namespace hqod {
namespace {

int64_t isa() { return static_cast<int64_t>(cpu_isa()); }

STABLE_TORCH_LIBRARY_IMPL(hqod, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&isa));
}

}  // namespace
}  // namespace hqod
