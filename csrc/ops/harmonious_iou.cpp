#include "kernels/losses/harmonious_iou.h"

#include "ops/loss.h"

namespace hqod {
namespace {

struct HarmoniousIoUOp {
  static constexpr const char* name = "harmonious_iou_loss";
  static constexpr Loss loss = Loss::harmonious_iou;
  static constexpr LossInput inputs[] = {pred_input("pred"), target_input("target")};
  using Form = Reduced;
  static HarmoniousIoUOptions options(double alpha, double gamma) { return {alpha, gamma}; }
};

HQOD_LIBRARY_IMPL(m) { register_loss<HarmoniousIoUOp>(m); }

}  // namespace
}  // namespace hqod
