// What a device does for the ops. The ops are the same for all of them: each device's library is
// these sources, compiled with its dispatch key, and its own definition of the functions below.
#pragma once

#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "kernels/fake_quant_call.h"
#include "kernels/loss_call.h"
#include "kernels/loss_list.h"

#define HQOD_IMPL_(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)
// Registers ops for this library's device.
#define HQOD_LIBRARY_IMPL(m) HQOD_IMPL_(hqod, HQOD_DISPATCH_KEY, m)

namespace hqod {

#define HQOD_LOSS_NAME(name) name,
enum class Loss { HQOD_LOSSES(HQOD_LOSS_NAME) };
#undef HQOD_LOSS_NAME

// All tensors of a call are on the device of like.
void run_loss_forward(Loss loss, LossCall& call, const Tensor& like);
void run_loss_backward(Loss loss, LossCall& call, const Tensor& like);
void run_fake_quant_forward(FakeQuantCall* const* calls, int64_t count, const Tensor& like);
void run_fake_quant_backward(FakeQuantCall* const* calls, int64_t count, const Tensor& like);

}  // namespace hqod
