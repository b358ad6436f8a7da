// The innermost loops of fake quantization: one scale for all (rows), or one for each place
// (tiles).
//
// None of them is inlined: inside the code around them compilers run out of registers.
#pragma once

#include <type_traits>

#include "kernels/cpu/convert.h"
#include "kernels/cpu/fake_quant.h"
#include "math/fake_quant_layout.h"

#define HQOD_LOOP __attribute__((noinline))

HQOD_MATH_BEGIN

template <typename T>
inline constexpr int64_t kLanes = 64 / sizeof(T);  // of a chunk, which is a vector or more

inline constexpr int64_t kGuess = 2048;  // elements of a row guessed at a time

// Independent sums, combined in a fixed order: enough of them to hide the adder's latency.
inline constexpr int64_t kSumLanes = 32;

// Whether to work from the end on: where y is a little ahead of x within their pages, since a load
// waits for an earlier store at the same place of another page. Not for sums along the way, whose
// order must not depend on addresses.
HQOD_HD bool from_the_end(const void* x, const void* y) {
  const uintptr_t ahead = reinterpret_cast<uintptr_t>(y) - reinterpret_cast<uintptr_t>(x);
  return (ahead - 1) % 4096 < 512;
}

// How often guessing was not sure. It does not pay on data that is full of ties or of NaN.
struct Guesses {
  int64_t made = 0, wrong = 0;

  template <typename T>
  HQOD_HD bool pay(T margin) const {
    return margin < T(0x1p-8) && wrong * 4 <= made + 4;
  }

  HQOD_HD bool add(bool sure) {
    ++made;
    wrong += !sure;
    return sure;
  }
};

// What is wanted of a backward pass, known at compile time; clipped: an activation comes first.
template <bool dx_, bool ds_, bool dz_, bool clipped_>
struct Want {
  static constexpr bool dx = dx_, ds = ds_, dz = dz_, clipped = clipped_;
};

// The scale of each place of a tile.
template <typename T>
struct TileScales {
  alignas(64) T scale[kTile], inverse[kTile], low[kTile], high[kTile];
  T x_low = T(0), x_high = T(0);
  T margin = T(0);       // the largest tie_margin
  bool shared = false;   // quotient_works for all of them
  bool scaled = false;   // and slopes_scale
  bool centred = false;  // without zero points, so low and high are the same for all of them

  template <bool is_centred>
  HQOD_HD QuantScale<T> at(int64_t i) const {
    const int64_t k = is_centred ? 0 : i;
    return {scale[i], inverse[i], low[k], high[k], x_low, x_high};
  }

  // Units of the same call and tile share it.
  void fill(const FakeQuantCall& call, const FakeQuantLayout& layout, const FakeQuantUnit& unit) {
    if (unit.channel == channel_) return;
    channel_ = unit.channel;
    const int64_t inner = layout.inner, period = layout.channels * inner;
    const int64_t width = unit.width < period ? unit.width : period, channels = width / inner;
    channels_from(call, unit.channel, channels);
    if (inner > 1) {
      for (int64_t c = channels - 1; c >= 0; --c) {
        const QuantScale<T> s = at<false>(c);
        for (int64_t k = c * inner; k < (c + 1) * inner; ++k) {
          scale[k] = s.scale;
          inverse[k] = s.inverse;
          low[k] = s.low;
          high[k] = s.high;
        }
      }
    }
    for (int64_t i = period; i < unit.width; ++i) {  // a tile of several periods
      scale[i] = scale[i - period];
      inverse[i] = inverse[i - period];
      low[i] = low[i - period];
      high[i] = high[i - period];
    }
  }

 private:
  int64_t channel_ = -1;  // the first one

  // A place a channel.
  void channels_from(const FakeQuantCall& call, int64_t first, int64_t n) {
    const QuantScale<T> zero = quant_scale(call, T(1), T(1), T(0));
    centred = call.zero_point == nullptr;
    x_low = zero.x_low;
    x_high = zero.x_high;
    copy(call.param_dtype, call.scale, first, n, scale);
    if (centred) {
      for (int64_t c = 0; c < n; ++c) low[c] = zero.low;
      for (int64_t c = 0; c < n; ++c) high[c] = zero.high;
    } else {
      copy(call.param_dtype, call.zero_point, first, n, high);
      for (int64_t c = 0; c < n; ++c) {
        const QuantScale<T> s = quant_scale(call, T(1), T(1), round_even(high[c]));
        scale[c] = s.scale == s.scale ? scale[c] : s.scale;
        low[c] = s.low;
        high[c] = s.high;
      }
    }
    int works = 1, slopes = 1;
    T largest = T(0);
    for (int64_t c = 0; c < n; ++c) {
      inverse[c] = T(1) / scale[c];
      const T own = tie_margin(at<false>(c));
      works &= quotient_works(scale[c]) & (own == own);
      slopes &= slopes_scale(at<false>(c));
      largest = own > largest ? own : largest;
    }
    shared = works != 0;
    scaled = (works & slopes) != 0;
    margin = largest;
  }
};

// y of one scale.
template <Ratio ratio, bool clipped, typename T>
HQOD_LOOP void forward_row(const T* __restrict x, T* __restrict y, int64_t n,
                           const QuantScale<T>& scale) {
  const QuantScale<T> s = scale;
  for (int64_t i = 0; i < n; ++i) y[i] = fake_quant<ratio, clipped>(x[i], s);
}

// The same by fake_quant_guess, where that is sure of a block.
template <bool clipped, typename T>
HQOD_LOOP void guess_row(const T* __restrict x, T* __restrict y, int64_t n,
                         const QuantScale<T>& scale, T margin, Guesses& guesses) {
  constexpr int64_t lanes = kLanes<T>;
  const QuantScale<T> s = scale;
  const bool down = from_the_end(x, y);
  const int64_t blocks = ceil_div(n, kGuess), step = down ? -lanes : lanes;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t start = (down ? blocks - 1 - block : block) * kGuess;
    const int64_t size = n - start < kGuess ? n - start : kGuess, chunks = size / lanes;
    int64_t i = start + (down ? (chunks - 1) * lanes : 0);
    Bits<T> doubts[lanes] = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk, i += step) {
      for (int64_t lane = 0; lane < lanes; ++lane) {
        y[i + lane] = fake_quant_guess<clipped>(x[i + lane], s, margin, doubts[lane]);
      }
    }
    Bits<T> doubt = 0;
    for (i = start + chunks * lanes; i < start + size; ++i) {
      y[i] = fake_quant_guess<clipped>(x[i], s, margin, doubt);
    }
    for (const Bits<T> d : doubts) doubt |= d;
    if (!guesses.add((doubt & kDoubt<T>) == 0)) {
      forward_row<Ratio::kInverse, clipped>(x + start, y + start, size, s);
    }
  }
}

// The slopes of a backward pass that works by the inverse are left times the scale until they are
// added up.
inline constexpr Slope slope_of(Ratio ratio) {
  return ratio == Ratio::kInverse ? Slope::kTimesScale : Slope::kPlain;
}

// dx of one scale, and what its sums grow by in kSumLanes lanes each.
template <Ratio ratio, typename W, typename T>
HQOD_LOOP void backward_row(const T* __restrict x, const T* __restrict dy, T* __restrict dx,
                            int64_t n, const QuantScale<T>& scale, T* __restrict sums_s,
                            T* __restrict sums_z) {
  const QuantScale<T> s = scale;
  int64_t i = 0;
  if constexpr (W::ds || W::dz) {
    T lanes_s[kSumLanes] = {}, lanes_z[kSumLanes] = {};
    for (; i + kSumLanes <= n; i += kSumLanes) {
      for (int64_t lane = 0; lane < kSumLanes; ++lane) {
        const FakeQuantGrad<T> g =
            fake_quant_grad<ratio, W::clipped, slope_of(ratio)>(x[i + lane], s, dy[i + lane]);
        if constexpr (W::dx) dx[i + lane] = g.dx;
        if constexpr (W::ds) lanes_s[lane] = mul_add(dy[i + lane], g.slope, lanes_s[lane]);
        if constexpr (W::dz) lanes_z[lane] += g.dz;
      }
    }
    for (int64_t lane = 0; lane < kSumLanes; ++lane) {
      if constexpr (W::ds) sums_s[lane] += lanes_s[lane];
      if constexpr (W::dz) sums_z[lane] += lanes_z[lane];
    }
  }
  for (int64_t lane = 0; i < n; ++i, ++lane) {
    const FakeQuantGrad<T> g = fake_quant_grad<ratio, W::clipped, slope_of(ratio)>(x[i], s, dy[i]);
    if constexpr (W::dx) dx[i] = g.dx;
    if constexpr (W::ds)
      sums_s[lane % kSumLanes] = mul_add(dy[i], g.slope, sums_s[lane % kSumLanes]);
    if constexpr (W::dz) sums_z[lane % kSumLanes] += g.dz;
  }
}

// y of n places of a tile, from place `first` on.
template <Ratio ratio, bool clipped, bool centred, typename T>
HQOD_LOOP void forward_tile(const T* __restrict x, T* __restrict y, int64_t n,
                            const TileScales<T>& __restrict s, int64_t first) {
  for (int64_t i = 0; i < n; ++i) {
    y[i] = fake_quant<ratio, clipped>(x[i], s.template at<centred>(first + i));
  }
}

// The same by fake_quant_guess, where that is sure of them.
template <bool clipped, bool centred, typename T>
HQOD_LOOP void guess_tile(const T* __restrict x, T* __restrict y, int64_t n,
                          const TileScales<T>& __restrict s, int64_t first, Guesses& guesses) {
  constexpr int64_t lanes = kLanes<T>;
  const T margin = s.margin;
  const bool down = from_the_end(x, y);
  const int64_t chunks = n / lanes, step = down ? -lanes : lanes;
  int64_t i = down ? (chunks - 1) * lanes : 0;
  Bits<T> doubts[lanes] = {};
  for (int64_t chunk = 0; chunk < chunks; ++chunk, i += step) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      y[i + lane] = fake_quant_guess<clipped>(x[i + lane], s.template at<centred>(first + i + lane),
                                              margin, doubts[lane]);
    }
  }
  Bits<T> doubt = 0;
  for (i = chunks * lanes; i < n; ++i) {
    y[i] = fake_quant_guess<clipped>(x[i], s.template at<centred>(first + i), margin, doubt);
  }
  for (const Bits<T> d : doubts) doubt |= d;
  if (!guesses.add((doubt & kDoubt<T>) == 0)) {
    forward_tile<Ratio::kInverse, clipped, centred>(x, y, n, s, first);
  }
}

// dx of the same, and what each place's sums grow by.
template <Ratio ratio, bool centred, typename W, typename T>
HQOD_LOOP void backward_tile(const T* __restrict x, const T* __restrict dy, T* __restrict dx,
                             int64_t n, const TileScales<T>& __restrict s, int64_t first,
                             T* __restrict sums_s, T* __restrict sums_z) {
  for (int64_t i = 0; i < n; ++i) {
    const QuantScale<T> scale = s.template at<centred>(first + i);
    const FakeQuantGrad<T> g =
        fake_quant_grad<ratio, W::clipped, slope_of(ratio)>(x[i], scale, dy[i]);
    if constexpr (W::dx) dx[i] = g.dx;
    if constexpr (W::ds) sums_s[first + i] = mul_add(dy[i], g.slope, sums_s[first + i]);
    if constexpr (W::dz) sums_z[first + i] += g.dz;
  }
}

HQOD_MATH_END
