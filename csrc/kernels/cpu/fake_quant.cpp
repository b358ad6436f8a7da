#include "kernels/cpu/fake_quant.h"

#include "kernels/cpu/convert.h"
#include "kernels/cpu/fake_quant_loops.h"

HQOD_MATH_BEGIN

inline constexpr int64_t kStage = 512;  // half-precision elements widened at a time

// A stretch of x, of dy and of y or dx while they are widened.
template <typename T>
struct Stage {
  alignas(64) T x[kStage], dy[kStage], out[kStage];
};

// Calls f(at, n, offset) for every stretch of a unit: at in memory, offset in the tile. A stretch
// is all that there is where the tensor's own memory serves, else what fits the stage.
template <typename F>
HQOD_HD void for_stretches(const FakeQuantCall& call, const FakeQuantLayout& layout,
                           const FakeQuantUnit& unit, F&& f) {
  const bool direct = call.dtype == Dtype::kFloat32 || call.dtype == Dtype::kFloat64;
  const int64_t most = direct ? unit.width : kStage;
  for (int64_t k = 0; k < unit.steps; ++k) {
    const int64_t at = unit.start + k * layout.stride;
    const int64_t width = layout.numel - at < unit.width ? layout.numel - at : unit.width;
    for (int64_t offset = 0; offset < width; offset += most) {
      f(at + offset, width - offset < most ? width - offset : most, offset);
    }
  }
}

template <Ratio ratio, bool clipped, typename T>
HQOD_HD void forward_unit(const FakeQuantCall& call, const FakeQuantLayout& layout,
                          const FakeQuantUnit& unit, const QuantScale<T>& row,
                          const TileScales<T>& tile, Stage<T>& stage, Guesses& guesses) {
  const T margin = layout.rows ? tie_margin(row) : tile.margin;
  for_stretches(call, layout, unit, [&](int64_t at, int64_t n, int64_t offset) {
    const T* x = read(call.dtype, call.x, at, n, stage.x);
    T* y = write_target(call.dtype, call.y, at, stage.out);
    if (ratio == Ratio::kInverse && guesses.pay(margin)) {
      if (layout.rows) {
        guess_row<clipped>(x, y, n, row, margin, guesses);
      } else if (tile.centred) {
        guess_tile<clipped, true>(x, y, n, tile, offset, guesses);
      } else {
        guess_tile<clipped, false>(x, y, n, tile, offset, guesses);
      }
    } else if (layout.rows) {
      forward_row<ratio, clipped>(x, y, n, row);
    } else if (tile.centred) {
      forward_tile<ratio, clipped, true>(x, y, n, tile, offset);
    } else {
      forward_tile<ratio, clipped, false>(x, y, n, tile, offset);
    }
    if (y == stage.out) write(call.dtype, y, call.y, at, n);
  });
}

// The units in the order that they are worked off: all of a tile, then all of the next.
inline FakeQuantUnit unit_in_order(const FakeQuantLayout& layout, int64_t index) {
  if (layout.rows) return fake_quant_unit(layout, index);
  return fake_quant_unit(layout, index % layout.blocks * layout.tiles + index / layout.blocks);
}

template <typename T, bool clipped>
void forward_units(const FakeQuantCall& call, int64_t begin, int64_t end) {
  const FakeQuantLayout layout = cpu_layout(call);
  Stage<T> stage;
  TileScales<T> tile;
  Guesses guesses;
  const bool down = from_the_end(call.x, call.y);
  for (int64_t k = begin; k < end; ++k) {
    const FakeQuantUnit unit = unit_in_order(layout, down ? begin + end - 1 - k : k);
    const QuantScale<T> row = channel_scale<T>(call, unit.channel);
    if (!layout.rows) tile.fill(call, layout, unit);
    if (layout.rows ? quotient_works(row.scale) : tile.shared) {
      forward_unit<Ratio::kInverse, clipped>(call, layout, unit, row, tile, stage, guesses);
    } else {
      forward_unit<Ratio::kDivided, clipped>(call, layout, unit, row, tile, stage, guesses);
    }
  }
}

// Adds up a unit's sums, [kSumLanes] of one channel or one for each element of a tile, in order.
template <typename T>
void collect(const T* sums, const FakeQuantLayout& layout, const FakeQuantUnit& unit, void* out) {
  double* row = static_cast<double*>(out) + unit.block * layout.channels;
  if (layout.rows) {
    double total = 0;
    for (int64_t lane = 0; lane < kSumLanes; ++lane) total += sums[lane];
    row[unit.channel] = total;
    return;
  }
  const int64_t channels = layout.tiles == 1 ? layout.channels : unit.width / layout.inner;
  for (int64_t c = 0; c < channels; ++c) row[unit.channel + c] = 0;
  int64_t channel = 0;
  for (int64_t i = 0; i < unit.width; i += layout.inner) {
    double total = 0;
    for (int64_t k = i; k < i + layout.inner; ++k) total += sums[k];
    row[unit.channel + channel] += total;
    if (++channel == channels) channel = 0;
  }
}

template <typename T>
struct UnitSums {
  alignas(64) T scale[kTile], zero_point[kTile];
};

template <Ratio ratio, typename W, typename T>
HQOD_HD void backward_unit(const FakeQuantCall& call, const FakeQuantLayout& layout,
                           const FakeQuantUnit& unit, const QuantScale<T>& row,
                           const TileScales<T>& tile, Stage<T>& stage, UnitSums<T>& sums) {
  for_stretches(call, layout, unit, [&](int64_t at, int64_t n, int64_t offset) {
    const T* x = read(call.dtype, call.x, at, n, stage.x);
    const T* dy = read(call.dtype, call.dy, at, n, stage.dy);
    T* dx = W::dx ? write_target(call.dtype, call.dx, at, stage.out) : nullptr;
    if (layout.rows) {
      backward_row<ratio, W>(x, dy, dx, n, row, sums.scale, sums.zero_point);
    } else if (tile.centred) {
      backward_tile<ratio, true, W>(x, dy, dx, n, tile, offset, sums.scale, sums.zero_point);
    } else {
      backward_tile<ratio, false, W>(x, dy, dx, n, tile, offset, sums.scale, sums.zero_point);
    }
    if (W::dx && dx == stage.out) write(call.dtype, dx, call.dx, at, n);
  });
}

template <typename T, typename W>
void backward_units(const FakeQuantCall& call, int64_t begin, int64_t end) {
  const FakeQuantLayout layout = cpu_layout(call);
  Stage<T> stage;
  TileScales<T> tile;
  UnitSums<T> sums;
  for (int64_t index = begin; index < end; ++index) {
    const FakeQuantUnit unit = unit_in_order(layout, index);
    const QuantScale<T> row = channel_scale<T>(call, unit.channel);
    if (!layout.rows) tile.fill(call, layout, unit);
    const int64_t used = layout.rows ? kSumLanes : unit.width;
    for (int64_t i = 0; i < used; ++i) sums.scale[i] = sums.zero_point[i] = T(0);
    if (layout.rows ? quotient_works(row.scale) && slopes_scale(row) : tile.scaled) {
      backward_unit<Ratio::kInverse, W>(call, layout, unit, row, tile, stage, sums);
      for (int64_t i = 0; i < used; ++i) {
        sums.scale[i] *= layout.rows ? row.inverse : tile.inverse[i];
        sums.zero_point[i] *= layout.rows ? -row.scale : -tile.scale[i];
      }
    } else {
      backward_unit<Ratio::kDivided, W>(call, layout, unit, row, tile, stage, sums);
    }
    if constexpr (W::ds) collect(sums.scale, layout, unit, call.scale_sums);
    if constexpr (W::dz) collect(sums.zero_point, layout, unit, call.zero_point_sums);
  }
}

template <typename T, bool clipped>
void backward_of(const FakeQuantCall& call, int64_t begin, int64_t end) {
  const bool dx = call.dx != nullptr, ds = call.scale_sums != nullptr;
  const bool dz = call.zero_point_sums != nullptr;
  if (dx && ds && dz) return backward_units<T, Want<true, true, true, clipped>>(call, begin, end);
  if (dx && ds) return backward_units<T, Want<true, true, false, clipped>>(call, begin, end);
  if (dx && dz) return backward_units<T, Want<true, false, true, clipped>>(call, begin, end);
  if (dx) return backward_units<T, Want<true, false, false, clipped>>(call, begin, end);
  if (ds && dz) return backward_units<T, Want<false, true, true, clipped>>(call, begin, end);
  if (ds) return backward_units<T, Want<false, true, false, clipped>>(call, begin, end);
  if (dz) return backward_units<T, Want<false, false, true, clipped>>(call, begin, end);
}

HQOD_MATH_END

namespace hqod {

void HQOD_KERNEL_NAME(fake_quant_forward)(const FakeQuantCall& call, int64_t begin, int64_t end) {
  with_compute_type(call.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (call.activation != 0) return forward_units<T, true>(call, begin, end);
    forward_units<T, false>(call, begin, end);
  });
}

void HQOD_KERNEL_NAME(fake_quant_backward)(const FakeQuantCall& call, int64_t begin, int64_t end) {
  with_compute_type(call.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (call.activation != 0) return backward_of<T, true>(call, begin, end);
    backward_of<T, false>(call, begin, end);
  });
}

}  // namespace hqod
