#include "kernels/cpu/fake_quant.h"

#include "kernels/cpu/convert.h"
#include "kernels/cpu/with_type.h"
#include "math/fake_quant.h"
#include "math/fake_quant_layout.h"

HQOD_MATH_BEGIN

// Independent sums, combined in a fixed order: enough of them to hide the adder's latency.
inline constexpr int64_t kSumLanes = 32;
inline constexpr int64_t kStage = 512;  // half-precision elements widened at a time

// What is wanted of a backward pass, known at compile time.
template <bool dx_, bool ds_, bool dz_>
struct Want {
  static constexpr bool dx = dx_, ds = ds_, dz = dz_;
};

template <typename T>
struct Range {
  T low, high;
};

// One scale for the whole stretch.
template <typename T>
HQOD_HD void forward_row(const T* __restrict x, T* __restrict y, int64_t n, T s, T z, Range<T> q) {
  for (int64_t i = 0; i < n; ++i) y[i] = fake_quant(x[i], s, z, q.low, q.high);
}

template <typename W, typename T>
HQOD_HD void backward_row(const T* __restrict x, const T* __restrict dy, T* __restrict dx, int64_t n,
                          T s, T z, Range<T> q, T* __restrict sums_s, T* __restrict sums_z) {
  int64_t i = 0;
  if constexpr (W::ds || W::dz) {
    T lanes_s[kSumLanes] = {}, lanes_z[kSumLanes] = {};
    for (; i + kSumLanes <= n; i += kSumLanes) {
      for (int64_t lane = 0; lane < kSumLanes; ++lane) {
        const FakeQuantGrad<T> g = fake_quant_grad(x[i + lane], s, z, q.low, q.high, dy[i + lane]);
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
    const FakeQuantGrad<T> g = fake_quant_grad(x[i], s, z, q.low, q.high, dy[i]);
    if constexpr (W::dx) dx[i] = g.dx;
    if constexpr (W::ds) sums_s[lane % kSumLanes] += g.ds;
    if constexpr (W::dz) sums_z[lane % kSumLanes] += g.dz;
  }
}

// A scale for each element, and a sum for each.
template <typename T>
HQOD_HD void forward_tile(const T* __restrict x, T* __restrict y, int64_t n, const T* __restrict s,
                          const T* __restrict z, Range<T> q) {
  for (int64_t i = 0; i < n; ++i) y[i] = fake_quant(x[i], s[i], z[i], q.low, q.high);
}

template <typename W, typename T>
HQOD_HD void backward_tile(const T* __restrict x, const T* __restrict dy, T* __restrict dx,
                           int64_t n, const T* __restrict s, const T* __restrict z, Range<T> q,
                           T* __restrict sums_s, T* __restrict sums_z) {
  for (int64_t i = 0; i < n; ++i) {
    const FakeQuantGrad<T> g = fake_quant_grad(x[i], s[i], z[i], q.low, q.high, dy[i]);
    if constexpr (W::dx) dx[i] = g.dx;
    if constexpr (W::ds) sums_s[i] += g.ds;
    if constexpr (W::dz) sums_z[i] += g.dz;
  }
}

// A stretch of x (and dy) as compute-type memory, and one of y or dx that is stored back: the
// tensor's own memory for float and double, a small buffer for the half types.
template <typename S>
struct Stage {
  using T = Compute<S>;
  static constexpr bool direct = __is_same(S, T);
  static constexpr int64_t step = direct ? (int64_t{1} << 62) : kStage;
  alignas(64) T x_buffer[direct ? 1 : kStage];
  alignas(64) T dy_buffer[direct ? 1 : kStage];
  alignas(64) T out_buffer[direct ? 1 : kStage];

  HQOD_HD const T* read(const void* base, int64_t at, int64_t n, T* buffer) {
    const S* from = static_cast<const S*>(base) + at;
    if constexpr (direct) {
      return from;
    } else {
      load(from, buffer, n);
      return buffer;
    }
  }

  HQOD_HD T* target(void* base, int64_t at) {
    if constexpr (direct) {
      return static_cast<S*>(base) + at;
    } else {
      return out_buffer;
    }
  }

  HQOD_HD void write(void* base, int64_t at, int64_t n) {
    if constexpr (!direct) store(out_buffer, static_cast<S*>(base) + at, n);
  }
};

// The scale and zero point of each element of a tile.
template <typename T>
struct TileParams {
  alignas(64) T scale[kTile], zero_point[kTile];

  void fill(const FakeQuantCall& call, const FakeQuantLayout& layout, int64_t first, int64_t width) {
    const T* s = static_cast<const T*>(call.scale);
    const T* z = static_cast<const T*>(call.zero_point);
    int64_t channel = first;
    for (int64_t i = 0; i < width; i += layout.inner) {
      const T zero = z == nullptr ? T(0) : round_even(z[channel]);
      for (int64_t k = i; k < i + layout.inner; ++k) {
        scale[k] = s[channel];
        zero_point[k] = zero;
      }
      if (++channel == layout.channels) channel = 0;
    }
  }
};

// Calls f(at, n, offset) for every stretch of a unit: at in memory, offset in the tile.
template <typename F>
HQOD_HD void for_stretches(const FakeQuantUnit& unit, int64_t numel, int64_t step, F&& f) {
  for (int64_t k = 0; k < unit.steps; ++k) {
    const int64_t at = unit.start + k * unit.stride;
    const int64_t width = numel - at < unit.width ? numel - at : unit.width;
    for (int64_t offset = 0; offset < width; offset += step) {
      f(at + offset, width - offset < step ? width - offset : step, offset);
    }
  }
}

template <typename S>
void forward_units(const FakeQuantCall& call, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const FakeQuantLayout layout = fake_quant_layout(call.outer, call.channels, call.inner);
  const int64_t numel = call.outer * call.channels * call.inner;
  const Range<T> q{static_cast<T>(call.quant_min), static_cast<T>(call.quant_max)};
  Stage<S> stage;
  TileParams<T> params;
  for (int64_t index = begin; index < end; ++index) {
    const FakeQuantUnit unit = fake_quant_unit(layout, index);
    if (!layout.rows) params.fill(call, layout, unit.channel, unit.width);
    const T s = static_cast<const T*>(call.scale)[unit.channel];
    const T* zs = static_cast<const T*>(call.zero_point);
    const T z = zs == nullptr ? T(0) : round_even(zs[unit.channel]);
    for_stretches(unit, numel, stage.step, [&](int64_t at, int64_t n, int64_t offset) {
      const T* x = stage.read(call.x, at, n, stage.x_buffer);
      T* y = stage.target(call.y, at);
      if (layout.rows) {
        forward_row(x, y, n, s, z, q);
      } else {
        forward_tile(x, y, n, params.scale + offset, params.zero_point + offset, q);
      }
      stage.write(call.y, at, n);
    });
  }
}

// Adds up a unit's sums, [kSumLanes] of one channel or one for each element of a tile, in order.
template <typename T>
void collect(const T* sums, const FakeQuantLayout& layout, const FakeQuantUnit& unit, double* out) {
  double* row = out + unit.block * layout.channels;
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

template <typename S, typename W>
void backward_units(const FakeQuantCall& call, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const FakeQuantLayout layout = fake_quant_layout(call.outer, call.channels, call.inner);
  const int64_t numel = call.outer * call.channels * call.inner;
  const Range<T> q{static_cast<T>(call.quant_min), static_cast<T>(call.quant_max)};
  Stage<S> stage;
  TileParams<T> params;
  alignas(64) T sums_s[kTile], sums_z[kTile];
  for (int64_t index = begin; index < end; ++index) {
    const FakeQuantUnit unit = fake_quant_unit(layout, index);
    if (!layout.rows) params.fill(call, layout, unit.channel, unit.width);
    const int64_t used = layout.rows ? kSumLanes : unit.width;
    for (int64_t i = 0; i < used; ++i) sums_s[i] = sums_z[i] = T(0);
    const T s = static_cast<const T*>(call.scale)[unit.channel];
    const T* zs = static_cast<const T*>(call.zero_point);
    const T z = zs == nullptr ? T(0) : round_even(zs[unit.channel]);
    for_stretches(unit, numel, stage.step, [&](int64_t at, int64_t n, int64_t offset) {
      const T* x = stage.read(call.x, at, n, stage.x_buffer);
      const T* dy = stage.read(call.dy, at, n, stage.dy_buffer);
      T* dx = W::dx ? stage.target(call.dx, at) : nullptr;
      if (layout.rows) {
        backward_row<W>(x, dy, dx, n, s, z, q, sums_s, sums_z);
      } else {
        backward_tile<W>(x, dy, dx, n, params.scale + offset, params.zero_point + offset, q,
                         sums_s + offset, sums_z + offset);
      }
      if constexpr (W::dx) stage.write(call.dx, at, n);
    });
    if constexpr (W::ds) collect(sums_s, layout, unit, call.scale_sums);
    if constexpr (W::dz) collect(sums_z, layout, unit, call.zero_point_sums);
  }
}

HQOD_MATH_END

namespace hqod {

void HQOD_KERNEL_NAME(fake_quant_forward)(const FakeQuantCall& call, int64_t begin, int64_t end) {
  with_type(call.dtype, [&](auto tag) { forward_units<decltype(tag)>(call, begin, end); });
}

void HQOD_KERNEL_NAME(fake_quant_backward)(const FakeQuantCall& call, int64_t begin, int64_t end) {
  const bool dx = call.dx != nullptr, ds = call.scale_sums != nullptr;
  const bool dz = call.zero_point_sums != nullptr;
  with_type(call.dtype, [&](auto tag) {
    using S = decltype(tag);
    if (dx && ds && dz) return backward_units<S, Want<true, true, true>>(call, begin, end);
    if (dx && ds) return backward_units<S, Want<true, true, false>>(call, begin, end);
    if (dx && dz) return backward_units<S, Want<true, false, true>>(call, begin, end);
    if (dx) return backward_units<S, Want<true, false, false>>(call, begin, end);
    if (ds && dz) return backward_units<S, Want<false, true, true>>(call, begin, end);
    if (ds) return backward_units<S, Want<false, true, false>>(call, begin, end);
    if (dz) return backward_units<S, Want<false, false, true>>(call, begin, end);
  });
}

}  // namespace hqod
