// One tensor's call of the fake-quant kernel: pointers and parameters, no tensor.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"
#include "math/fake_quant.h"

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

  // [blocks, channels] partial sums of a device on its way to these gradients, in its own dtype.
  void* scale_sums = nullptr;
  void* zero_point_sums = nullptr;
};

}  // namespace hqod

HQOD_MATH_BEGIN

template <typename T>
HQOD_HD T channel_zero(const FakeQuantCall& call, int64_t channel) {
  if (call.zero_point == nullptr) return T(0);
  return round_even(read_one<T>(call.param_dtype, call.zero_point, channel));
}

template <typename T>
HQOD_HD QuantScale<T> quant_scale(const FakeQuantCall& call, T scale, T inverse, T zero) {
  return quant_scale(scale, inverse, zero, static_cast<T>(call.quant_min),
                     static_cast<T>(call.quant_max), static_cast<Activation>(call.activation));
}

template <typename T>
HQOD_HD QuantScale<T> channel_scale(const FakeQuantCall& call, int64_t channel) {
  const T scale = read_one<T>(call.param_dtype, call.scale, channel);
  return quant_scale(call, scale, T(1) / scale, channel_zero<T>(call, channel));
}

HQOD_MATH_END
