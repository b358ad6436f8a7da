#include "kernels/losses/box_iou.h"

#include "ops/loss.h"

namespace hqod {
namespace {

struct BoxIoUOp {
  static constexpr const char* name = "aligned_box_iou";
  static constexpr Loss loss = Loss::box_iou;
  static constexpr LossInput inputs[] = {pred_input("boxes1"), target_input("boxes2")};
  using Form = PerSample;
  static NoOptions options() { return {}; }
};

HQOD_LIBRARY_IMPL(m) { register_loss<BoxIoUOp>(m); }

}  // namespace
}  // namespace hqod
