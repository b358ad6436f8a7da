// The gradients of scales and zero points from their partial sums [blocks, channels].
#pragma once

#include "kernels/cuda/fake_quant_item.h"
#include "kernels/cuda/launch.h"

HQOD_MATH_BEGIN

// A block has kThreads / lanes channels, each with as many lanes as add up its sums.
template <int n_items>
struct FakeQuantTotalKernel {
  static constexpr int kThreads = 1024, kBlocks = 1, kPhases = 4;
  static constexpr int kSector = 8;  // neighbouring floats that a read brings along
  static constexpr int kAtOnce = 8;  // loads of a thread under way
  struct Shared {
    double sums[2][kThreads];
  };
  using Local = Nothing;

  FakeQuantTable<n_items> table;  // first_unit counts the blocks of this launch

  HQOD_HD static int lanes_of(int64_t blocks, int64_t channels) {
    int width = 1, lanes = 1;
    while (width < kSector && width < channels) width *= 2;
    while (lanes < kThreads / width && lanes < blocks) lanes *= 2;
    return lanes;
  }

  // The most lanes that have a sum after a phase.
  HQOD_HD static constexpr int left(int phase) {
    return phase == 0 ? kThreads : phase == 1 ? 128 : phase == 2 ? 16 : 1;
  }

  // Every lanes-th of a channel's sums.
  template <typename P>
  HQOD_HD static double sum_of(const void* sums, const FakeQuantItem& item, int64_t channel,
                               int lane, int lanes) {
    const P* from = static_cast<const P*>(sums) + channel;
    const int64_t blocks = item.layout.blocks, channels = item.call.channels;
    double sum = 0;
    HQOD_ROLL
    for (int64_t b = lane; b < blocks; b += kAtOnce * lanes) {
      P parts[kAtOnce];
      HQOD_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        parts[i] = b + i * lanes < blocks ? from[(b + i * lanes) * channels] : P(0);
      }
      HQOD_UNROLL
      for (int i = 0; i < kAtOnce; ++i) sum += parts[i];
    }
    return sum;
  }

  template <int phase>
  HQOD_HD void run(int64_t block, int thread, Shared& shared, Local&) const {
    const FakeQuantItem& item = table.items[find_item(table, static_cast<uint32_t>(block))];
    const FakeQuantCall& call = item.call;
    const int lanes = lanes_of(item.layout.blocks, call.channels), width = kThreads / lanes;
    const int column = thread % width, lane = thread / width;
    const int64_t channel = (block - item.first_unit) * width + column;
    if (channel >= call.channels) return;
    HQOD_ROLL
    for (int which = 0; which < 2; ++which) {
      void* gradient = which == 0 ? call.d_scale : call.d_zero_point;
      const void* sums = which == 0 ? call.scale_sums : call.zero_point_sums;
      if (gradient == nullptr) continue;
      double sum = 0;
      if constexpr (phase == 0) {
        sum = call.dtype == Dtype::kFloat64 ? sum_of<double>(sums, item, channel, lane, lanes)
                                            : sum_of<float>(sums, item, channel, lane, lanes);
      } else {
        constexpr int after = left(phase), most = left(phase - 1);
        if (lane >= after) continue;
        const int before = lanes < most ? lanes : most;
        for (int i = lane; i < before; i += after) sum += shared.sums[which][i * width + column];
      }
      if constexpr (phase == kPhases - 1) {
        write_one(call.param_dtype, gradient, channel, sum * call.factor);
      } else {
        shared.sums[which][thread] = sum;
      }
    }
  }
};

HQOD_MATH_END
