#include "kernels/losses/hqod.h"

#include "ops/loss.h"

namespace hqod {
namespace {

struct HqodOp {
  static constexpr const char* name = "hqod_loss";
  static constexpr Loss loss = Loss::hqod;
  static constexpr LossInput inputs[] = {pred_input("pred"), target_input("target"),
                                         scores_input("scores")};
  using Form = Averaged;
  static HqodOptions options(bool logits, int64_t variant, double alpha, double gamma,
                             double hiou_weight, double tcorr_weight) {
    return {{logits, code_of("variant", variant, 2)}, alpha, gamma, hiou_weight, tcorr_weight};
  }
};

HQOD_LIBRARY_IMPL(m) { register_loss<HqodOp>(m); }

}  // namespace
}  // namespace hqod
