#include "kernels/losses/generalized_box_iou.h"

#include "ops/loss.h"

namespace hqod {
namespace {

struct GeneralizedBoxIoUOp {
  static constexpr const char* name = "generalized_box_iou_loss";
  static constexpr Loss loss = Loss::generalized_box_iou;
  static constexpr LossInput inputs[] = {pred_input("boxes1"), target_input("boxes2")};
  using Form = Reduced;
  static GeneralizedBoxIoUOptions options(double eps) { return {eps}; }
};

HQOD_LIBRARY_IMPL(m) { register_loss<GeneralizedBoxIoUOp>(m); }

}  // namespace
}  // namespace hqod
