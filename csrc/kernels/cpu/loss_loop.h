// The loop that every loss kernel shares: blocks of samples, each field in an array of its own, so
// that the formula in between is a plain vector loop.
#pragma once

#include "kernels/cpu/convert.h"
#include "kernels/loss_call.h"
#include "math/box_iou.h"

HQOD_MATH_BEGIN

inline constexpr int64_t kBlock = 64;  // samples held in arrays at a time: they stay in L1
inline constexpr int64_t kLanes = 16;  // independent sums, combined in a fixed order

template <typename T>
struct BoxBlock {
  alignas(64) T x1[kBlock], y1[kBlock], x2[kBlock], y2[kBlock];

  HQOD_HD Box<T> operator[](int64_t i) const { return {x1[i], y1[i], x2[i], y2[i]}; }

  HQOD_HD void set(int64_t i, const Box<T>& box) {
    x1[i] = box.x1;
    y1[i] = box.y1;
    x2[i] = box.x2;
    y2[i] = box.y2;
  }

  HQOD_HD void load_from(Dtype dtype, const void* from, int64_t start, int64_t n) {
    alignas(64) T buffer[4 * kBlock];
    const T* __restrict boxes = read(dtype, from, 4 * start, 4 * n, buffer);
    for (int64_t i = 0; i < n; ++i) {
      x1[i] = boxes[4 * i];
      y1[i] = boxes[4 * i + 1];
      x2[i] = boxes[4 * i + 2];
      y2[i] = boxes[4 * i + 3];
    }
  }

  HQOD_HD void store_to(Dtype dtype, void* to, int64_t start, int64_t n) const {
    alignas(64) T buffer[4 * kBlock];
    T* __restrict boxes = write_target(dtype, to, 4 * start, buffer);
    for (int64_t i = 0; i < n; ++i) {
      boxes[4 * i] = x1[i];
      boxes[4 * i + 1] = y1[i];
      boxes[4 * i + 2] = x2[i];
      boxes[4 * i + 3] = y2[i];
    }
    if (boxes == buffer) write(dtype, buffer, to, 4 * start, 4 * n);
  }
};

// Samples start to start + n of an array as T.
template <typename T>
HQOD_HD void load_values(Dtype dtype, const void* from, int64_t start, int64_t n, T* out) {
  const T* values = read(dtype, from, start, n, out);
  if (values == out) return;
  for (int64_t i = 0; i < n; ++i) out[i] = values[i];
}

template <typename T>
HQOD_HD void store_values(Dtype dtype, const T* values, void* to, int64_t start, int64_t n) {
  T* out = write_target(dtype, to, start, const_cast<T*>(values));
  if (out == values) return write(dtype, values, to, start, n);
  for (int64_t i = 0; i < n; ++i) out[i] = values[i];
}

template <typename T>
HQOD_HD void load_weight(const LossCall& call, int64_t start, int64_t n, T* out) {
  if (call.weight != nullptr) return load_values(call.weight_dtype, call.weight, start, n, out);
  for (int64_t i = 0; i < n; ++i) out[i] = T(1);
}

// Sums of a block's losses in lanes of their own, combined in a fixed order.
template <typename T>
struct LaneSums {
  alignas(64) T lanes[kLanes] = {};

  // Clears the block behind its n values up to a whole number of lanes.
  HQOD_HD void add(T* block, int64_t n) {
    for (int64_t i = n; i % kLanes != 0; ++i) block[i] = T(0);
    for (int64_t i = 0; i < n; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += block[i + lane];
    }
  }

  HQOD_HD double total() const {
    double sum = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
    return sum;
  }
};

// A Formula has the Type it computes in, its Inputs, which load a block by load_from(call, start,
// n), and loss(inputs, i).
template <typename Formula>
void loss_forward(const LossCall& call, int64_t begin, int64_t end) {
  using T = typename Formula::Type;
  const Formula formula(call);
  typename Formula::Inputs in;
  alignas(64) T loss[kBlock], weight[kBlock];
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * kLossChunk;
    const int64_t last = first + kLossChunk < call.count ? first + kLossChunk : call.count;
    LaneSums<T> sums;
    for (int64_t start = first; start < last; start += kBlock) {
      const int64_t n = last - start < kBlock ? last - start : kBlock;
      in.load_from(call, start, n);
      load_weight(call, start, n, weight);
      for (int64_t i = 0; i < n; ++i) loss[i] = weight[i] * formula.loss(in, i);
      if (call.loss != nullptr) {
        T* out = static_cast<T*>(call.loss) + start;
        for (int64_t i = 0; i < n; ++i) out[i] = loss[i];
      } else {
        sums.add(loss, n);
      }
    }
    if (call.partial_sums != nullptr) call.partial_sums[chunk] = sums.total();
  }
}

// Formula::grad(inputs, i, g) leaves sample i's gradients in inputs, which store_to(call, start, n)
// writes out, and returns its loss. With call.partial_sums the losses are added up as well, and g
// is the weight times call.factor; otherwise it is that times the upstream gradient.
template <typename Formula>
void loss_backward(const LossCall& call, int64_t begin, int64_t end) {
  using T = typename Formula::Type;
  const Formula formula(call);
  typename Formula::Inputs in;
  alignas(64) T loss[kBlock], weight[kBlock], grad[kBlock];
  const T* upstream = static_cast<const T*>(call.grad);
  const bool one_upstream = upstream == nullptr || call.grad_is_scalar;
  const T factor = static_cast<T>(call.factor) *
                   (upstream != nullptr && call.grad_is_scalar ? upstream[0] : T(1));
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * kLossChunk;
    const int64_t last = first + kLossChunk < call.count ? first + kLossChunk : call.count;
    LaneSums<T> sums;
    for (int64_t start = first; start < last; start += kBlock) {
      const int64_t n = last - start < kBlock ? last - start : kBlock;
      in.load_from(call, start, n);
      load_weight(call, start, n, weight);
      if (one_upstream) {
        for (int64_t i = 0; i < n; ++i) grad[i] = weight[i] * factor;
      } else {
        for (int64_t i = 0; i < n; ++i) grad[i] = weight[i] * factor * upstream[start + i];
      }
      for (int64_t i = 0; i < n; ++i) loss[i] = weight[i] * formula.grad(in, i, grad[i]);
      in.store_to(call, start, n);
      if (call.partial_sums != nullptr) sums.add(loss, n);
    }
    if (call.partial_sums != nullptr) call.partial_sums[chunk] = sums.total();
  }
}

HQOD_MATH_END
