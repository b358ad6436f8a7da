// Memory layout of dense tensors: contiguous, channels_last or any other permutation.
#pragma once

#include "checks.h"

namespace hqod {

// Whether x covers its memory without gaps or overlap, in whatever order of dimensions.
inline bool is_dense(const Tensor& x) {
  if (x.is_contiguous()) return true;
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t expected = 1;
  for (;;) {  // find the dimension that continues the block of memory known so far
    bool all_covered = true, found = false;
    for (int64_t d = 0; d < x.dim() && !found; ++d) {
      if (sizes[d] == 1 || strides[d] < expected) continue;
      all_covered = false;
      if (strides[d] == expected) {
        expected *= sizes[d];
        found = true;
      }
    }
    if (!found) return all_covered && expected == x.numel();
  }
}

// Whether two tensors of one shape have their elements in the same order in memory.
inline bool same_layout(const Tensor& x, const Tensor& y) {
  const auto sizes = x.sizes(), a = x.strides(), b = y.strides();
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (sizes[d] != 1 && a[d] != b[d]) return false;
  }
  return true;
}

}  // namespace hqod
