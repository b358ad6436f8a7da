// What the fake-quant kernels know of one tensor, and the table of those that one launch works on:
// a kernel's parameter, so nothing has to be copied to the device first.
#pragma once

#include "kernels/fake_quant_call.h"
#include "math/fake_quant_layout.h"

HQOD_MATH_BEGIN

struct FakeQuantItem {
  FakeQuantCall call;
  FakeQuantLayout layout;
  uint32_t first_unit;  // of this tensor, counting the units of all tensors of the table
  int at_once;          // steps of a tile that a block takes at once
  bool vector;          // every access of a thread is aligned to its size
};

template <int n>
struct FakeQuantTable {
  FakeQuantItem items[n];
  int count;
};

// The tensor that a unit belongs to: the last one that starts at or before it.
template <int n>
HQOD_HD int find_item(const FakeQuantTable<n>& table, uint32_t unit) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.items[middle].first_unit <= unit ? low : high) = middle;
  }
  return low;
}

HQOD_MATH_END
