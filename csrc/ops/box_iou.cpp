// aligned_box_iou.
#include <tuple>

#include "ops/loss.h"

namespace hqod {
namespace {

Tensor aligned_box_iou(const Tensor& boxes1,    // [..., 4]
                       const Tensor& boxes2) {  // [..., 4]
  LossBuilder b("boxes1", boxes1, boxes1.numel() / 4);
  b.boxes("boxes1", boxes1, "boxes2", boxes2);
  return b.forward(Loss::box_iou, boxes1, boxes1.dim() - 1, 0, std::nullopt);
}

std::tuple<Tensor, Tensor> aligned_box_iou_backward(const Tensor& grad,    // [...]
                                                    const Tensor& boxes1,  // [..., 4]
                                                    const Tensor& boxes2,  // [..., 4]
                                                    int64_t wanted) {
  LossBuilder b("boxes1", boxes1, boxes1.numel() / 4);
  b.boxes("boxes1", boxes1, "boxes2", boxes2);
  b.upstream(grad, boxes1, 0, std::nullopt);
  Tensor d_boxes1 = b.wanted(wanted & kFirst, boxes1, b.call.d_pred);
  Tensor d_boxes2 = b.wanted(wanted & kSecond, boxes2, b.call.d_target);
  b.backward(Loss::box_iou, boxes1);
  return {d_boxes1, d_boxes2};
}

HQOD_LIBRARY_IMPL(m) {
  m.impl("aligned_box_iou", TORCH_BOX(&aligned_box_iou));
  m.impl("_aligned_box_iou_backward", TORCH_BOX(&aligned_box_iou_backward));
}

}  // namespace
}  // namespace hqod
