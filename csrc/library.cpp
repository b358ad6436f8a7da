// Every op's schema on one page. Reductions are 0 none, 1 mean, 2 sum; variants as in math/tcorr.h;
// `wanted` has bit i set when input i's gradient is asked for, the others come back empty.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>

#include "kernels/cpu/isa.h"

namespace {

// A loss: <name>(<inputs><rest>) -> Tensor, and beside it
//
//   _<name>_backward(Tensor grad, <inputs><rest>, int wanted) -> a gradient for each input
//   _<name>_and_grad(<inputs><rest>, int wanted) -> the loss and these gradients, from one pass
//
// the last for a loss that can be reduced. Inputs are all the tensors that have a gradient.
template <typename Library>
void def_loss(Library& m, const std::string& name, const std::string& inputs,
              const std::string& rest) {
  std::string gradients = "Tensor";
  for (auto more = std::count(inputs.begin(), inputs.end(), ','); more > 0; --more) {
    gradients += ", Tensor";
  }
  const std::string arguments = inputs + rest;
  m.def((name + "(" + arguments + ") -> Tensor").c_str());
  m.def(
      ("_" + name + "_backward(Tensor grad, " + arguments + ", int wanted) -> (" + gradients + ")")
          .c_str());
  if (rest.find("int reduction") == std::string::npos) return;
  m.def(("_" + name + "_and_grad(" + arguments + ", int wanted) -> (Tensor, " + gradients + ")")
            .c_str());
}

}  // namespace

STABLE_TORCH_LIBRARY(hqod, m) {
  m.def("_cpu_isa() -> int");

  def_loss(m, "aligned_box_iou", "Tensor boxes1, Tensor boxes2", "");
  def_loss(m, "harmonious_iou_loss", "Tensor pred, Tensor target",
           ", Tensor? weight, float alpha, float gamma, int reduction");
  for (const char* kind : {"generalized", "distance", "complete", "efficient", "scylla"}) {
    def_loss(m, std::string(kind) + "_box_iou_loss", "Tensor boxes1, Tensor boxes2",
             ", Tensor? weight, float eps, int reduction");
  }
  def_loss(m, "tcorr_loss", "Tensor scores, Tensor ious",
           ", Tensor? weight, bool logits, int variant, int reduction");
  def_loss(m, "hqod_loss", "Tensor pred, Tensor target, Tensor scores",
           ", Tensor? weight, bool logits, int variant, float alpha, float gamma, "
           "float hiou_weight, float tcorr_weight, int reduction, float? avg_factor");

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
