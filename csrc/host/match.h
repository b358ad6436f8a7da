// Greedy matching of detections with ground truth, as COCO's evaluation does it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "math/box_iou.h"

namespace hqod::host {

// In order of descending score, a detection takes the free ground truth of its label with the highest
// IoU, the last one of several, if that IoU is at least the threshold. The values must be finite.
inline void match_detections(const double* det_boxes,    // [D, 4]
                             const double* det_scores,   // [D]
                             const int64_t* det_labels,  // [D]
                             int64_t num_det,
                             const double* gt_boxes,    // [G, 4]
                             const int64_t* gt_labels,  // [G]
                             int64_t num_gt,
                             double iou_threshold,
                             int64_t* matched,  // [D], out: index of the ground truth, -1 for none
                             double* ious) {    // [D], out: IoU with it, 0 for none
  const auto box_at = [](const double* boxes, int64_t i) {
    const double* b = boxes + 4 * i;
    return Box<double>{b[0], b[1], b[2], b[3]};
  };
  std::vector<int64_t> order(num_det);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return det_scores[a] > det_scores[b]; });
  std::vector<char> taken(num_gt, 0);
  for (const int64_t d : order) {
    const Box<double> box = box_at(det_boxes, d);
    int64_t best = -1;
    double best_iou = iou_threshold;
    for (int64_t g = 0; g < num_gt; ++g) {
      if (taken[g] || gt_labels[g] != det_labels[d]) continue;
      const double iou = box_overlap(box, box_at(gt_boxes, g)).iou;
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
