// One tensor's call of the fake-quant kernel: pointers and parameters, no tensor.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace hqod {

struct FakeQuantCall {
  Dtype dtype;                       // of x, y, dy and dx
  int64_t outer, channels, inner;    // memory order of x: see math/fake_quant_layout.h
  const void* x = nullptr;           // [outer, channels, inner]
  const void* scale = nullptr;       // [channels], in the compute type
  const void* zero_point = nullptr;  // [channels], in the compute type, or null: 0
  double quant_min, quant_max;

  void* y = nullptr;  // forward

  const void* dy = nullptr;           // backward, laid out as x
  void* dx = nullptr;                 // or null: not wanted
  double* scale_sums = nullptr;       // [blocks, channels] partial sums, or null: not wanted
  double* zero_point_sums = nullptr;  // [blocks, channels], or null: not wanted
};

}  // namespace hqod
