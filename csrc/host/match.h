// Greedy matching of detections with ground truth, as COCO's evaluation does it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace hqod::host {

// IoU of two boxes (x1, y1, x2, y2), sides clamped at 0, union at 1e-6. Unlike math/box_iou.h,
// which multiplies by a reciprocal, it divides: the IoU of a box with itself is exactly 1, and
// equal IoUs tie as they do in COCO's evaluation.
inline double pair_iou(const double* a, const double* b) {
  const auto side = [](double low, double high) { return std::max(high - low, 0.0); };
  const double inter = side(std::max(a[0], b[0]), std::min(a[2], b[2])) *
                       side(std::max(a[1], b[1]), std::min(a[3], b[3]));
  const double area_a = side(a[0], a[2]) * side(a[1], a[3]);
  const double area_b = side(b[0], b[2]) * side(b[1], b[3]);
  return inter / std::max(area_a + area_b - inter, 1e-6);
}

// In order of descending score, a detection takes the free ground truth of its label with the
// highest IoU, the last one of several, if that IoU is at least the threshold. The values must be
// finite.
inline void match_detections(const double* det_boxes,    // [D, 4]
                             const double* det_scores,   // [D]
                             const int64_t* det_labels,  // [D]
                             int64_t num_det,
                             const double* gt_boxes,    // [G, 4]
                             const int64_t* gt_labels,  // [G]
                             int64_t num_gt, double iou_threshold,
                             int64_t* matched,  // [D], out: index of the ground truth, -1 for none
                             double* ious) {    // [D], out: IoU with it, 0 for none
  std::vector<int64_t> order(num_det);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return det_scores[a] > det_scores[b]; });
  std::vector<char> taken(num_gt, 0);
  for (const int64_t d : order) {
    int64_t best = -1;
    double best_iou = iou_threshold;
    for (int64_t g = 0; g < num_gt; ++g) {
      if (taken[g] || gt_labels[g] != det_labels[d]) continue;
      const double iou = pair_iou(det_boxes + 4 * d, gt_boxes + 4 * g);
      if (iou >= best_iou) {
        best = g;
        best_iou = iou;
      }
    }
    matched[d] = best;
    ious[d] = best < 0 ? 0.0 : best_iou;
    if (best >= 0) taken[best] = 1;
  }
}

}  // namespace hqod::host
