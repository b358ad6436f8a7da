#include "kernels/losses/scylla_box_iou.h"

#include "ops/loss.h"

namespace hqod {
namespace {

struct ScyllaBoxIoUOp {
  static constexpr const char* name = "scylla_box_iou_loss";
  static constexpr Loss loss = Loss::scylla_box_iou;
  static constexpr LossInput inputs[] = {pred_input("boxes1"), target_input("boxes2")};
  using Form = Reduced;
  static BoxPairOptions options(double eps) { return {eps}; }
};

HQOD_LIBRARY_IMPL(m) { register_loss<ScyllaBoxIoUOp>(m); }

}  // namespace
}  // namespace hqod
