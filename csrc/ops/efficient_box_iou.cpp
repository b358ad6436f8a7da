#include "kernels/losses/efficient_box_iou.h"

#include "ops/loss.h"

namespace hqod {
namespace {

struct EfficientBoxIoUOp {
  static constexpr const char* name = "efficient_box_iou_loss";
  static constexpr Loss loss = Loss::efficient_box_iou;
  static constexpr LossInput inputs[] = {pred_input("boxes1"), target_input("boxes2")};
  using Form = Reduced;
  static BoxPairOptions options(double eps) { return {eps}; }
};

HQOD_LIBRARY_IMPL(m) { register_loss<EfficientBoxIoUOp>(m); }

}  // namespace
}  // namespace hqod
