// The loop that every loss kernel shares: blocks of samples, each field in an array of its own, so
// that the formula in between is a plain vector loop.
#pragma once

#include "kernels/cpu/convert.h"
#include "kernels/cpu/losses.h"
#include "kernels/losses/inputs.h"

HQOD_MATH_BEGIN

inline constexpr int64_t kBlock = 64;  // samples held in arrays at a time: they stay in L1
inline constexpr int64_t kLanes = 16;  // independent sums, combined in a fixed order

template <typename T>
using Boxes = BoxBlock<T, kBlock>;

template <typename T>
HQOD_HD void load_boxes(Dtype dtype, const void* from, int64_t start, int64_t n, Boxes<T>& out) {
  alignas(64) T buffer[4 * kBlock];
  const T* __restrict boxes = read(dtype, from, 4 * start, 4 * n, buffer);
  for (int64_t i = 0; i < n; ++i) {
    out.x1[i] = boxes[4 * i];
    out.y1[i] = boxes[4 * i + 1];
    out.x2[i] = boxes[4 * i + 2];
    out.y2[i] = boxes[4 * i + 3];
  }
}

template <typename T>
HQOD_HD void store_boxes(Dtype dtype, const Boxes<T>& from, void* to, int64_t start, int64_t n) {
  alignas(64) T buffer[4 * kBlock];
  T* __restrict boxes = write_target(dtype, to, 4 * start, buffer);
  for (int64_t i = 0; i < n; ++i) {
    boxes[4 * i] = from.x1[i];
    boxes[4 * i + 1] = from.y1[i];
    boxes[4 * i + 2] = from.x2[i];
    boxes[4 * i + 3] = from.y2[i];
  }
  if (boxes == buffer) write(dtype, buffer, to, 4 * start, 4 * n);
}

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

// A block of one value, which stands until it is overwritten.
template <typename T>
HQOD_HD void fill(T* block, T value) {
  for (int64_t i = 0; i < kBlock; ++i) block[i] = value;
}

// 0 behind the n values of a block, up to a whole number of lanes: loops without a remainder.
template <typename T>
HQOD_HD void pad(T* block, int64_t n) {
  for (int64_t i = n; i % kLanes != 0; ++i) block[i] = T(0);
}

template <typename T>
HQOD_HD void pad_boxes(Boxes<T>& boxes, int64_t n) {
  pad(boxes.x1, n);
  pad(boxes.y1, n);
  pad(boxes.x2, n);
  pad(boxes.y2, n);
}

HQOD_HD int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

template <typename Inputs>
HQOD_HD void load_inputs(const LossCall& call, int64_t start, int64_t n, Inputs& in) {
  if constexpr (Inputs::boxes) {
    load_boxes(call.dtype, call.pred, start, n, in.pred);
    load_boxes(call.dtype, call.target, start, n, in.target);
    pad_boxes(in.pred, n);
    pad_boxes(in.target, n);
  }
  if constexpr (Inputs::scores) {
    load_values(call.dtype, call.scores, start, n, in.score);
    pad(in.score, n);
  }
  if constexpr (Inputs::ious) {
    load_values(call.dtype, call.ious, start, n, in.iou);
    pad(in.iou, n);
  }
}

template <bool target_grad, typename Inputs>
HQOD_HD void store_gradients(const LossCall& call, const Inputs& in, int64_t start, int64_t n) {
  if constexpr (Inputs::boxes) {
    if (call.d_pred != nullptr) store_boxes(call.dtype, in.d_pred, call.d_pred, start, n);
    if constexpr (target_grad) store_boxes(call.dtype, in.d_target, call.d_target, start, n);
  }
  if constexpr (Inputs::scores) {
    if (call.d_scores != nullptr) store_values(call.dtype, in.d_score, call.d_scores, start, n);
  }
  if constexpr (Inputs::ious) {
    if (call.d_ious != nullptr) store_values(call.dtype, in.d_iou, call.d_ious, start, n);
  }
}

// Sums of a block's losses in lanes of their own, combined in a fixed order.
template <typename T>
struct LaneSums {
  alignas(64) T lanes[kLanes] = {};

  HQOD_HD void add(T* block, int64_t n) {
    pad(block, n);
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

template <typename Formula>
void loss_forward(const Formula& formula, const LossCall& call, int64_t begin, int64_t end) {
  using T = typename Formula::Type;
  typename Formula::template Inputs<kBlock> in;
  alignas(64) T loss[kBlock], weight[kBlock];
  fill(weight, T(1));
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * kLossChunk;
    const int64_t last = first + kLossChunk < call.count ? first + kLossChunk : call.count;
    LaneSums<T> sums;
    for (int64_t start = first; start < last; start += kBlock) {
      const int64_t n = last - start < kBlock ? last - start : kBlock;
      load_inputs(call, start, n, in);
      if (call.weight != nullptr) load_values(call.weight_dtype, call.weight, start, n, weight);
      run_stages<false>(formula, in, padded(n));
      for (int64_t i = 0; i < n; ++i) loss[i] = weight[i] * in.loss[i];
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

// With call.partial_sums the losses are added up beside the gradients.
template <bool target_grad, typename Formula>
void loss_backward(const Formula& formula, const LossCall& call, int64_t begin, int64_t end) {
  using T = typename Formula::Type;
  typename Formula::template Inputs<kBlock> in;
  alignas(64) T loss[kBlock], weight[kBlock], grad[kBlock];
  const T* upstream = static_cast<const T*>(call.grad);
  const bool one_upstream = upstream == nullptr || call.grad_is_scalar;
  const T factor = static_cast<T>(call.factor) *
                   (upstream != nullptr && call.grad_is_scalar ? upstream[0] : T(1));
  fill(weight, T(1));
  fill(grad, factor);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * kLossChunk;
    const int64_t last = first + kLossChunk < call.count ? first + kLossChunk : call.count;
    LaneSums<T> sums;
    for (int64_t start = first; start < last; start += kBlock) {
      const int64_t n = last - start < kBlock ? last - start : kBlock;
      load_inputs(call, start, n, in);
      if (call.weight != nullptr) {
        load_values(call.weight_dtype, call.weight, start, n, weight);
        for (int64_t i = 0; i < n; ++i) grad[i] = weight[i] * factor;
      }
      if (!one_upstream) {
        for (int64_t i = 0; i < n; ++i) grad[i] = weight[i] * factor * upstream[start + i];
      }
      run_stages<true>(formula, in, padded(n));
      for (int64_t i = 0; i < padded(n); ++i) in.template finish<target_grad>(i, grad[i]);
      for (int64_t i = 0; i < n; ++i) loss[i] = weight[i] * in.loss[i];
      store_gradients<target_grad>(call, in, start, n);
      if (call.partial_sums != nullptr) sums.add(loss, n);
    }
    if (call.partial_sums != nullptr) call.partial_sums[chunk] = sums.total();
  }
}

HQOD_MATH_END

// The kernels of a loss, compiled once for every instruction set.
#define HQOD_DEFINE_LOSS_KERNELS(name)                                                       \
  namespace hqod {                                                                           \
  void HQOD_KERNEL_NAME(name##_forward)(const LossCall& call, int64_t begin, int64_t end) {  \
    with_##name(call, [&](auto formula) { loss_forward(formula, call, begin, end); });       \
  }                                                                                          \
  void HQOD_KERNEL_NAME(name##_backward)(const LossCall& call, int64_t begin, int64_t end) { \
    with_##name(call, [&](auto formula) {                                                    \
      if (call.d_target != nullptr) return loss_backward<true>(formula, call, begin, end);   \
      loss_backward<false>(formula, call, begin, end);                                       \
    });                                                                                      \
  }                                                                                          \
  }
