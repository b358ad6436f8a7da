// The CPU kernels of fake quantization, each over a range of units (math/fake_quant_layout.h).
#pragma once

#include "kernels/cpu/isa.h"
#include "kernels/fake_quant_call.h"
#include "math/fake_quant_layout.h"

HQOD_DECLARE_KERNEL(fake_quant_forward, const FakeQuantCall& call, int64_t begin, int64_t end)
HQOD_DECLARE_KERNEL(fake_quant_backward, const FakeQuantCall& call, int64_t begin, int64_t end)

HQOD_MATH_BEGIN

inline constexpr int64_t kTile = 1024;
inline constexpr FakeQuantTuning kCpuTuning{
    .unit = 16384, .tile = kTile, .tile_steps = 64, .row_min = 192, .vector = 16};

inline FakeQuantLayout cpu_layout(const FakeQuantCall& call) {
  return fake_quant_layout(call.outer, call.channels, call.inner, kCpuTuning);
}

HQOD_MATH_END
