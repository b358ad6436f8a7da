// The CPU: kernels spread over torch's threads, partial sums added up in order.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "device/device.h"
#include "kernels/cpu/fake_quant.h"
#include "kernels/cpu/losses.h"

namespace hqod {
namespace {

using LossKernel = void (*)(const LossCall&, int64_t, int64_t);
using FakeQuantKernel = void (*)(const FakeQuantCall&, int64_t, int64_t);

constexpr int64_t kChunkGrain = 2;        // chunks below which a second thread does not pay
constexpr int64_t kElementGrain = 32768;  // and elements of fake quantization

LossKernel forward_kernel(Loss loss) {
#define HQOD_CASE(name) \
  case Loss::name:      \
    return HQOD_KERNEL(name##_forward);
  switch (loss) { HQOD_LOSSES(HQOD_CASE) }
#undef HQOD_CASE
  return nullptr;
}

LossKernel backward_kernel(Loss loss) {
#define HQOD_CASE(name) \
  case Loss::name:      \
    return HQOD_KERNEL(name##_backward);
  switch (loss) { HQOD_LOSSES(HQOD_CASE) }
#undef HQOD_CASE
  return nullptr;
}

void run_loss(LossKernel kernel, LossCall& call) {
  constexpr int64_t kInline = 64;
  double inline_sums[kInline];
  std::unique_ptr<double[]> more;
  const int64_t chunks = loss_chunks(call);
  if (call.total != nullptr) {
    if (chunks > kInline) more = std::make_unique_for_overwrite<double[]>(chunks);
    call.partial_sums = chunks > kInline ? more.get() : inline_sums;
  }
  if (chunks <= kChunkGrain) {
    kernel(call, 0, chunks);
  } else {
    torch::stable::parallel_for(0, chunks, kChunkGrain,
                                [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  }
  if (call.total != nullptr) {
    double sum = 0;
    for (int64_t i = 0; i < chunks; ++i) sum += call.partial_sums[i];
    write_one(call.loss_dtype(), call.total, 0, sum * call.factor);
  }
}

// Runs every unit of every call, spread over the threads.
void run_fake_quant(FakeQuantKernel kernel, FakeQuantCall* const* calls, int64_t count) {
  std::vector<int64_t> first(count + 1, 0);  // of each call, counting the units of all
  int64_t elements = 0;
  for (int64_t i = 0; i < count; ++i) {
    const FakeQuantLayout layout = cpu_layout(*calls[i]);
    first[i + 1] = first[i] + layout.units;
    elements += layout.numel;
  }
  const auto run_range = [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < count && first[i] < end; ++i) {
      const int64_t from = std::max(begin, first[i]), to = std::min(end, first[i + 1]);
      if (from < to) kernel(*calls[i], from - first[i], to - first[i]);
    }
  };
  const int64_t units = first[count];
  if (elements <= kElementGrain) return run_range(0, units);
  const int64_t grain = std::max<int64_t>(1, units * kElementGrain / elements);
  torch::stable::parallel_for(0, units, grain, run_range);
}

// The gradient of a parameter: its partial sums added up in order.
void add_up(const FakeQuantCall& call, int64_t blocks, const void* sums, void* gradient) {
  for (int64_t c = 0; c < call.channels; ++c) {
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b)
      total += static_cast<const double*>(sums)[b * call.channels + c];
    write_one(call.param_dtype, gradient, c, total * call.factor);
  }
}

}  // namespace

void run_loss_forward(Loss loss, LossCall& call, const Tensor&) {
  run_loss(forward_kernel(loss), call);
}

void run_loss_backward(Loss loss, LossCall& call, const Tensor&) {
  run_loss(backward_kernel(loss), call);
}

void run_fake_quant_forward(FakeQuantCall* const* calls, int64_t count, const Tensor&) {
  run_fake_quant(HQOD_KERNEL(fake_quant_forward), calls, count);
}

void run_fake_quant_backward(FakeQuantCall* const* calls, int64_t count, const Tensor&) {
  std::vector<std::unique_ptr<double[]>> sums;
  const auto new_sums = [&](const FakeQuantCall& call) {
    const int64_t size = std::max<int64_t>(cpu_layout(call).blocks * call.channels, 1);
    return sums.emplace_back(std::make_unique_for_overwrite<double[]>(size)).get();
  };
  for (int64_t i = 0; i < count; ++i) {
    if (calls[i]->d_scale != nullptr) calls[i]->scale_sums = new_sums(*calls[i]);
    if (calls[i]->d_zero_point != nullptr) calls[i]->zero_point_sums = new_sums(*calls[i]);
  }
  run_fake_quant(HQOD_KERNEL(fake_quant_backward), calls, count);
  for (int64_t i = 0; i < count; ++i) {
    const FakeQuantCall& call = *calls[i];
    const int64_t blocks = cpu_layout(call).blocks;
    if (call.d_scale != nullptr) add_up(call, blocks, call.scale_sums, call.d_scale);
    if (call.d_zero_point != nullptr) add_up(call, blocks, call.zero_point_sums, call.d_zero_point);
  }
}

}  // namespace hqod
