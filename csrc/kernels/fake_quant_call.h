// One tensor's call of the fake-quant kernel: pointers and parameters, no tensor.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"
#include "math/fake_quant.h"
#include "math/fake_quant_layout.h"

namespace hqod {

struct FakeQuantCall {
  Dtype dtype;                       // of x, y, dy and dx
  Dtype param_dtype;                 // of scale, zero point and their gradients
  int activation = 0;                // an Activation, applied to x first
  int64_t outer, channels, inner;    // memory order of x: see math/fake_quant_layout.h
  const void* x = nullptr;           // [outer, channels, inner]
  const void* scale = nullptr;       // [channels]
  const void* zero_point = nullptr;  // [channels], or null: 0
  double quant_min, quant_max;

  void* y = nullptr;  // forward, laid out as x

  const void* dy = nullptr;      // backward, laid out as x
  void* dx = nullptr;            // or null: not wanted
  void* d_scale = nullptr;       // [channels], or null: not wanted
  void* d_zero_point = nullptr;  // [channels], or null: not wanted
  double factor = 1.0;           // of the gradients to scale and zero point

  // [blocks, channels] partial sums of a device on its way to these gradients.
  double* scale_sums = nullptr;
  double* zero_point_sums = nullptr;
};

}  // namespace hqod

HQOD_MATH_BEGIN

HQOD_HD FakeQuantLayout layout_of(const FakeQuantCall& call) {
  return fake_quant_layout(call.outer, call.channels, call.inner);
}

template <typename T>
HQOD_HD QuantScale<T> channel_scale(const FakeQuantCall& call, int64_t channel) {
  const T zero_point =
      call.zero_point == nullptr ? T(0) : read_one<T>(call.param_dtype, call.zero_point, channel);
  return quant_scale(read_one<T>(call.param_dtype, call.scale, channel), zero_point,
                     static_cast<T>(call.quant_min), static_cast<T>(call.quant_max),
                     static_cast<Activation>(call.activation));
}

HQOD_MATH_END
