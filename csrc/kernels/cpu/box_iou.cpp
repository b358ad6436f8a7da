#include "kernels/cpu/loss_inputs.h"
#include "kernels/cpu/losses.h"

HQOD_MATH_BEGIN

template <typename T, bool target_grad>
struct BoxIoU {
  using Type = T;
  using Inputs = BoxInputs<T, target_grad>;

  explicit BoxIoU(const LossCall&) {}

  HQOD_HD T loss(const Inputs& in, int64_t i) const { return in.overlap(i).iou; }

  HQOD_HD T grad(Inputs& in, int64_t i, T g) const {
    const Overlap<T> o = in.overlap(i);
    in.set_grad(i, o, g);
    return o.iou;
  }
};

HQOD_MATH_END

namespace hqod {

void HQOD_KERNEL_NAME(box_iou_forward)(const LossCall& call, int64_t begin, int64_t end) {
  with_compute_type(call.dtype, [&](auto tag) {
    using T = decltype(tag);
    loss_forward<BoxIoU<T, false>>(call, begin, end);
  });
}

void HQOD_KERNEL_NAME(box_iou_backward)(const LossCall& call, int64_t begin, int64_t end) {
  with_compute_type(call.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (call.d_target != nullptr) {
      loss_backward<BoxIoU<T, true>>(call, begin, end);
    } else {
      loss_backward<BoxIoU<T, false>>(call, begin, end);
    }
  });
}

}  // namespace hqod
