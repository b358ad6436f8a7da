// The CUDA kernels of fake quantization, for host code. They run on a stream and throw
// std::runtime_error.
#pragma once

#include <algorithm>

#include "kernels/cuda/launch_types.h"
#include "kernels/fake_quant_call.h"
#include "math/fake_quant_layout.h"

namespace hqod {

// Steps of a tile that a block takes at once: a tile is then narrower, and one that has a channel
// at every place leaves as many times fewer partial sums.
inline int64_t cuda_steps_at_once(int64_t inner) { return inner == 1 ? 8 : inner <= 32 ? 4 : 1; }

// Elements of an access: 16 bytes in a row; in a tile not more than four, each with its own scale.
inline int64_t cuda_vector(const FakeQuantCall& call, bool rows) {
  if (call.dtype == Dtype::kFloat64) return 2;
  return call.dtype == Dtype::kFloat32 || !rows ? 4 : 8;
}

// A block works on one unit: four accesses a thread in a row, fewer where the device would not be
// full, more where that leaves work enough for it, or where a row, as of a weight, then is one
// unit, whose sum is its gradient; in a tile one access a thread at each of as many steps as keep
// partial sums below a thirtieth of the tensor, and more likewise.
inline FakeQuantLayout cuda_layout(const FakeQuantCall& call) {
  constexpr int64_t kThreads = 256, kEnoughUnits = 1024, kMostElements = 64;
  constexpr int64_t kFewUnits = 384, kManyRows = 128;
  const int64_t size = call.dtype == Dtype::kFloat64 ? 8 : call.dtype == Dtype::kFloat32 ? 4 : 2;
  const int64_t vector = cuda_vector(call, false), stretch = kThreads * vector;
  const int64_t at_once = cuda_steps_at_once(call.inner);
  const int64_t in_row = cuda_vector(call, true), access = kThreads * in_row;
  const int64_t numel = call.outer * call.channels * call.inner;
  const int64_t fewest = std::clamp<int64_t>(ceil_div(numel, kFewUnits * access), 1, 4);
  const int64_t most_accesses = kMostElements / in_row, row_accesses = ceil_div(call.inner, access);
  int64_t accesses = std::clamp(numel / (2 * kEnoughUnits * access), fewest, most_accesses);
  const bool one_step = call.outer == 1, whole = one_step && call.channels >= kManyRows;
  if (whole && row_accesses <= most_accesses) accesses = std::max(accesses, row_accesses);
  FakeQuantTuning tuning{.unit = accesses * access,
                         .tile = stretch / at_once,
                         .tile_steps = 1,
                         .row_min = (one_step ? stretch / 2 : stretch) + 1,  // a tile has one row
                         .vector = vector};
  const FakeQuantLayout layout = fake_quant_layout(call.outer, call.channels, call.inner, tuning);
  if (layout.numel == 0) return layout;
  if (layout.rows) {  // units of equal size, in whole accesses of a warp
    const int64_t warp = 32 * in_row, size = ceil_div(layout.inner, layout.per_row);
    tuning.unit = ceil_div(size, warp) * warp;
    return fake_quant_layout(call.outer, call.channels, call.inner, tuning);
  }
  const int64_t least = ceil_div(256, call.inner * size), most = std::max<int64_t>(least, 16);
  const int64_t steps = std::clamp(layout.steps * layout.tiles / kEnoughUnits, least, most);
  tuning.tile_steps = ceil_div(steps, 2 * at_once) * 2 * at_once;
  return fake_quant_layout(call.outer, call.channels, call.inner, tuning);
}

// Partial sums that a backward call needs for each of d_scale and d_zero_point: floats, or doubles
// for a double x.
inline int64_t cuda_fake_quant_sums(const FakeQuantCall& call) {
  const int64_t blocks = cuda_layout(call).blocks;
  return blocks == 1 ? 0 : blocks * call.channels;
}

// All calls in one launch, per dtype and 96 of them; backward one more for the partial sums.
void cuda_fake_quant(FakeQuantCall* const* calls, int64_t count, bool backward, Stream stream);

}  // namespace hqod
