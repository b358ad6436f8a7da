// The CPU kernels of fake quantization, each over a range of units (math/fake_quant_layout.h).
#pragma once

#include "kernels/cpu/isa.h"
#include "kernels/fake_quant_call.h"

HQOD_DECLARE_KERNEL(fake_quant_forward, const FakeQuantCall& call, int64_t begin, int64_t end)
HQOD_DECLARE_KERNEL(fake_quant_backward, const FakeQuantCall& call, int64_t begin, int64_t end)
