// The loop that every loss kernel shares: blocks of samples, each field in an array of its own, so
// that the formula in between is a plain vector loop.
#pragma once

#include "kernels/cpu/with_type.h"
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

  HQOD_HD void split(const T* __restrict boxes, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      x1[i] = boxes[4 * i];
      y1[i] = boxes[4 * i + 1];
      x2[i] = boxes[4 * i + 2];
      y2[i] = boxes[4 * i + 3];
    }
  }

  HQOD_HD void join(T* __restrict boxes, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) {
      boxes[4 * i] = x1[i];
      boxes[4 * i + 1] = y1[i];
      boxes[4 * i + 2] = x2[i];
      boxes[4 * i + 3] = y2[i];
    }
  }

  template <typename Source>
  HQOD_HD void load_from(const Source* boxes, int64_t n) {
    if constexpr (__is_same(Source, T)) {
      split(boxes, n);
    } else {
      alignas(64) T wide[4 * kBlock];
      load(boxes, wide, 4 * n);
      split(wide, n);
    }
  }

  template <typename Target>
  HQOD_HD void store_to(Target* boxes, int64_t n) const {
    if constexpr (__is_same(Target, T)) {
      join(boxes, n);
    } else {
      alignas(64) T wide[4 * kBlock];
      join(wide, n);
      store(wide, boxes, 4 * n);
    }
  }
};

template <typename T>
__attribute__((noinline)) void load_weight(const LossCall& call, int64_t start, int64_t n, T* out) {
  if (call.weight == nullptr) {
    for (int64_t i = 0; i < n; ++i) out[i] = T(1);
    return;
  }
  with_type(call.weight_dtype, [&](auto tag) {
    using W = decltype(tag);
    if constexpr (__is_same(Compute<W>, T)) load(static_cast<const W*>(call.weight) + start, out, n);
  });
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

// A Formula has its Inputs, which load a block by load_from(call, start, n), and loss(inputs, i).
template <typename S, typename Formula>
void loss_forward(const LossCall& call, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const Formula formula(call);
  typename Formula::Inputs in;
  alignas(64) T loss[kBlock], weight[kBlock];
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * kLossChunk;
    const int64_t last = first + kLossChunk < call.count ? first + kLossChunk : call.count;
    LaneSums<T> sums;
    for (int64_t start = first; start < last; start += kBlock) {
      const int64_t n = last - start < kBlock ? last - start : kBlock;
      in.template load_from<S>(call, start, n);
      load_weight(call, start, n, weight);
      for (int64_t i = 0; i < n; ++i) loss[i] = weight[i] * formula.loss(in, i);
      if (call.loss != nullptr) {
        store(loss, static_cast<T*>(call.loss) + start, n);
      } else {
        sums.add(loss, n);
      }
    }
    if (call.partial_sums != nullptr) call.partial_sums[chunk] = sums.total();
  }
}

// Formula::grad(inputs, i, g) leaves sample i's gradients in inputs, which store_to(call, start, n)
// writes out, and returns its loss. With call.partial_sums the losses are added up as well, and g is
// the weight times call.factor; otherwise it is that times the upstream gradient.
template <typename S, typename Formula>
void loss_backward(const LossCall& call, int64_t begin, int64_t end) {
  using T = Compute<S>;
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
      in.template load_from<S>(call, start, n);
      load_weight(call, start, n, weight);
      if (one_upstream) {
        for (int64_t i = 0; i < n; ++i) grad[i] = weight[i] * factor;
      } else {
        for (int64_t i = 0; i < n; ++i) grad[i] = weight[i] * factor * upstream[start + i];
      }
      for (int64_t i = 0; i < n; ++i) loss[i] = weight[i] * formula.grad(in, i, grad[i]);
      in.template store_to<S>(call, start, n);
      if (call.partial_sums != nullptr) sums.add(loss, n);
    }
    if (call.partial_sums != nullptr) call.partial_sums[chunk] = sums.total();
  }
}

HQOD_MATH_END
