// A CUDA device: kernels on torch's current stream, partial sums in memory of torch's allocator.
#include <optional>
#include <vector>

#include "device/allocate.h"
#include "device/cuda_stream.h"
#include "device/device.h"
#include "kernels/cuda/fake_quant.h"
#include "kernels/cuda/losses.h"

namespace hqod {
namespace {

using CudaLoss = void (*)(const LossCall&, bool, Stream);

CudaLoss cuda_loss(Loss loss) {
#define HQOD_CASE(name) \
  case Loss::name:      \
    return cuda_##name;
  switch (loss) { HQOD_LOSSES(HQOD_CASE) }
#undef HQOD_CASE
  return nullptr;
}

// Doubles of a call's own: freed with the tensor, in the order of the stream.
Tensor scratch(int64_t count, const Tensor& like) {
  const int64_t stride = 1;
  return empty_strided(&count, &stride, 1, ScalarType::Double, like);
}

// Room for partial sums of a fake-quant call, in doubles: most of them are floats.
int64_t sums_size(const FakeQuantCall& call) {
  const int64_t count = cuda_fake_quant_sums(call);
  return call.dtype == Dtype::kFloat64 ? count : (count + 1) / 2;
}

void run_loss(Loss loss, LossCall& call, const Tensor& like, bool backward) {
  const OnDevice device(like);
  const int64_t chunks = cuda_loss_chunks(call);
  if (call.total == nullptr || chunks == 1) {
    if (chunks > 0) cuda_loss(loss)(call, backward, device.stream());
    return;
  }
  const Tensor sums = scratch(chunks, like);
  call.partial_sums = static_cast<double*>(sums.mutable_data_ptr());
  if (chunks > 0) cuda_loss(loss)(call, backward, device.stream());
  cuda_loss_total(call, device.stream());
}

}  // namespace

void run_loss_forward(Loss loss, LossCall& call, const Tensor& like) {
  run_loss(loss, call, like, false);
}

void run_loss_backward(Loss loss, LossCall& call, const Tensor& like) {
  run_loss(loss, call, like, true);
}

void run_fake_quant_forward(FakeQuantCall* const* calls, int64_t count, const Tensor& like) {
  const OnDevice device(like);
  cuda_fake_quant(calls, count, false, device.stream());
}

void run_fake_quant_backward(FakeQuantCall* const* calls, int64_t count, const Tensor& like) {
  const OnDevice device(like);
  int64_t doubles = 0;
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < count; ++i) {
    sizes.push_back(sums_size(*calls[i]));
    if (calls[i]->d_scale != nullptr) doubles += sizes[i];
    if (calls[i]->d_zero_point != nullptr) doubles += sizes[i];
  }
  std::optional<Tensor> sums;  // none where each channel has one partial sum
  if (doubles > 0) sums = scratch(doubles, like);
  double* next = doubles > 0 ? static_cast<double*>(sums->mutable_data_ptr()) : nullptr;
  for (int64_t i = 0; i < count; ++i) {
    if (calls[i]->d_scale != nullptr) calls[i]->scale_sums = next, next += sizes[i];
    if (calls[i]->d_zero_point != nullptr) calls[i]->zero_point_sums = next, next += sizes[i];
  }
  cuda_fake_quant(calls, count, true, device.stream());
}

}  // namespace hqod
