#include "kernels/cpu/fake_quant.h"

#include "kernels/cpu/convert.h"

HQOD_MATH_BEGIN

// Independent sums, combined in a fixed order: enough of them to hide the adder's latency.
inline constexpr int64_t kSumLanes = 32;
inline constexpr int64_t kStage = 512;  // half-precision elements widened at a time

// What is wanted of a backward pass, known at compile time; clipped: an activation comes first.
template <bool dx_, bool ds_, bool dz_, bool clipped_>
struct Want {
  static constexpr bool dx = dx_, ds = ds_, dz = dz_, clipped = clipped_;
};

// One scale for the whole stretch.
template <Ratio ratio, bool clipped, typename T>
HQOD_HD void forward_row(const T* __restrict x, T* __restrict y, int64_t n, QuantScale<T> s) {
  for (int64_t i = 0; i < n; ++i) y[i] = fake_quant<ratio, clipped>(x[i], s);
}

template <Ratio ratio, typename W, typename T>
HQOD_HD void backward_row(const T* __restrict x, const T* __restrict dy, T* __restrict dx,
                          int64_t n, QuantScale<T> s, T* __restrict sums_s, T* __restrict sums_z) {
  int64_t i = 0;
  if constexpr (W::ds || W::dz) {
    T lanes_s[kSumLanes] = {}, lanes_z[kSumLanes] = {};
    for (; i + kSumLanes <= n; i += kSumLanes) {
      for (int64_t lane = 0; lane < kSumLanes; ++lane) {
        const FakeQuantGrad<T> g = fake_quant_grad<ratio, W::clipped>(x[i + lane], s, dy[i + lane]);
        if constexpr (W::dx) dx[i + lane] = g.dx;
        if constexpr (W::ds) lanes_s[lane] += g.ds;
        if constexpr (W::dz) lanes_z[lane] += g.dz;
      }
    }
    for (int64_t lane = 0; lane < kSumLanes; ++lane) {
      if constexpr (W::ds) sums_s[lane] += lanes_s[lane];
      if constexpr (W::dz) sums_z[lane] += lanes_z[lane];
    }
  }
  for (int64_t lane = 0; i < n; ++i, ++lane) {
    const FakeQuantGrad<T> g = fake_quant_grad<ratio, W::clipped>(x[i], s, dy[i]);
    if constexpr (W::dx) dx[i] = g.dx;
    if constexpr (W::ds) sums_s[lane % kSumLanes] += g.ds;
    if constexpr (W::dz) sums_z[lane % kSumLanes] += g.dz;
  }
}

// The scale of each element of a tile.
template <typename T>
struct TileScales {
  alignas(64) T scale[kTile], inverse[kTile], low[kTile], high[kTile];
  T x_low = T(0), x_high = T(0);
  bool shared = false;   // quotient_works for all of them
  bool centred = false;  // without zero points, so low and high are the same for all of them

  template <bool is_centred>
  HQOD_HD QuantScale<T> at(int64_t i) const {
    const int64_t k = is_centred ? 0 : i;
    return {scale[i], inverse[i], low[k], high[k], x_low, x_high};
  }

  void fill(const FakeQuantCall& call, const FakeQuantLayout& layout, const FakeQuantUnit& unit) {
    shared = true;
    centred = call.zero_point == nullptr;
    int64_t channel = unit.channel;
    for (int64_t i = 0; i < unit.width; i += layout.inner) {
      const QuantScale<T> s = channel_scale<T>(call, channel);
      shared &= quotient_works(s.scale);
      x_low = s.x_low;
      x_high = s.x_high;
      for (int64_t k = i; k < i + layout.inner; ++k) {
        scale[k] = s.scale;
        inverse[k] = s.inverse;
        low[k] = s.low;
        high[k] = s.high;
      }
      if (++channel == layout.channels) channel = 0;
    }
  }
};

// A scale for each element, from index first of the tile on, and a sum for each.
template <Ratio ratio, bool clipped, bool centred, typename T>
HQOD_HD void forward_tile(const T* __restrict x, T* __restrict y, int64_t n, const TileScales<T>& s,
                          int64_t first) {
  for (int64_t i = 0; i < n; ++i) {
    y[i] = fake_quant<ratio, clipped>(x[i], s.template at<centred>(first + i));
  }
}

template <Ratio ratio, bool centred, typename W, typename T>
HQOD_HD void backward_tile(const T* __restrict x, const T* __restrict dy, T* __restrict dx,
                           int64_t n, const TileScales<T>& s, int64_t first, T* __restrict sums_s,
                           T* __restrict sums_z) {
  for (int64_t i = 0; i < n; ++i) {
    const QuantScale<T> scale = s.template at<centred>(first + i);
    const FakeQuantGrad<T> g = fake_quant_grad<ratio, W::clipped>(x[i], scale, dy[i]);
    if constexpr (W::dx) dx[i] = g.dx;
    if constexpr (W::ds) sums_s[first + i] += g.ds;
    if constexpr (W::dz) sums_z[first + i] += g.dz;
  }
}

// A stretch of x, of dy and of y or dx while they are widened.
template <typename T>
struct Stage {
  alignas(64) T x[kStage], dy[kStage], out[kStage];
};

// Elements that are taken at a time: all where the tensor's own memory serves, else a stage.
HQOD_HD int64_t stretch(Dtype dtype) {
  const bool direct = dtype == Dtype::kFloat32 || dtype == Dtype::kFloat64;
  return direct ? int64_t{1} << 62 : kStage;
}

// Calls f(at, n, offset) for every stretch of a unit: at in memory, offset in the tile.
template <typename F>
HQOD_HD void for_stretches(const FakeQuantLayout& layout, const FakeQuantUnit& unit, int64_t step,
                           F&& f) {
  for (int64_t k = 0; k < unit.steps; ++k) {
    const int64_t at = unit.start + k * layout.stride;
    const int64_t width = layout.numel - at < unit.width ? layout.numel - at : unit.width;
    for (int64_t offset = 0; offset < width; offset += step) {
      f(at + offset, width - offset < step ? width - offset : step, offset);
    }
  }
}

template <Ratio ratio, bool clipped, typename T>
HQOD_HD void forward_unit(const FakeQuantCall& call, const FakeQuantLayout& layout,
                          const FakeQuantUnit& unit, const QuantScale<T>& row,
                          const TileScales<T>& tile, Stage<T>& stage) {
  const int64_t step = stretch(call.dtype);
  for_stretches(layout, unit, step, [&](int64_t at, int64_t n, int64_t offset) {
    const T* x = read(call.dtype, call.x, at, n, stage.x);
    T* y = write_target(call.dtype, call.y, at, stage.out);
    if (layout.rows) {
      forward_row<ratio, clipped>(x, y, n, row);
    } else if (tile.centred) {
      forward_tile<ratio, clipped, true>(x, y, n, tile, offset);
    } else {
      forward_tile<ratio, clipped, false>(x, y, n, tile, offset);
    }
    if (y == stage.out) write(call.dtype, y, call.y, at, n);
  });
}

template <typename T, bool clipped>
void forward_units(const FakeQuantCall& call, int64_t begin, int64_t end) {
  const FakeQuantLayout layout = cpu_layout(call);
  Stage<T> stage;
  TileScales<T> tile;
  for (int64_t index = begin; index < end; ++index) {
    const FakeQuantUnit unit = fake_quant_unit(layout, index);
    const QuantScale<T> row = channel_scale<T>(call, unit.channel);
    if (!layout.rows) tile.fill(call, layout, unit);
    if (layout.rows ? quotient_works(row.scale) : tile.shared) {
      forward_unit<Ratio::kInverse, clipped>(call, layout, unit, row, tile, stage);
    } else {
      forward_unit<Ratio::kDivided, clipped>(call, layout, unit, row, tile, stage);
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
  const int64_t step = stretch(call.dtype);
  for_stretches(layout, unit, step, [&](int64_t at, int64_t n, int64_t offset) {
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
    const FakeQuantUnit unit = fake_quant_unit(layout, index);
    const QuantScale<T> row = channel_scale<T>(call, unit.channel);
    if (!layout.rows) tile.fill(call, layout, unit);
    const int64_t used = layout.rows ? kSumLanes : unit.width;
    for (int64_t i = 0; i < used; ++i) sums.scale[i] = sums.zero_point[i] = T(0);
    if (layout.rows ? quotient_works(row.scale) : tile.shared) {
      backward_unit<Ratio::kInverse, W>(call, layout, unit, row, tile, stage, sums);
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
