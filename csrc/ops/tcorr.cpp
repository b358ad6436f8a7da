#include "kernels/losses/tcorr.h"

#include "ops/loss.h"

namespace hqod {
namespace {

struct TCorrOp {
  static constexpr const char* name = "tcorr_loss";
  static constexpr Loss loss = Loss::tcorr;
  static constexpr LossInput inputs[] = {scores_input("scores"), ious_input("ious")};
  using Form = Reduced;
  static TCorrOptions options(bool logits, int64_t variant) {
    return {logits, code_of("variant", variant, 2)};
  }
};

HQOD_LIBRARY_IMPL(m) { register_loss<TCorrOp>(m); }

}  // namespace
}  // namespace hqod
