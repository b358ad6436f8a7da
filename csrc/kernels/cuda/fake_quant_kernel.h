// The kernels of fake quantization: a block a unit of math/fake_quant_layout.h, a thread the
// vectors at its place in the unit. In a row all have one scale; in a tile a thread's scales stay
// the same from step to step, so that no element costs a division by the layout.
#pragma once

#include "kernels/cuda/fake_quant_item.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/pack.h"

HQOD_MATH_BEGIN

inline constexpr int kFakeQuantThreads = 256;

// The places of a thread in a stretch of elements that some threads access at once: neighbours,
// also where no vector is aligned, so that sums are the same wherever a tensor lies in memory.
template <typename S, int n>
struct Places {
  int thread;
  bool vector;

  HQOD_HD int at(int j) const { return thread * n + j; }

  // Where there is nothing a thread does nothing, and so a warp that lies beyond the width.
  HQOD_HD bool any(int width) const { return at(0) < width; }

  // Whether this thread has a whole vector of a stretch, or nothing.
  HQOD_HD bool whole(int width) const { return vector && (at(n - 1) < width || !any(width)); }

  // `all_whole`: a single access, known to be whole.
  template <bool all_whole>
  HQOD_HD Pack<S, n> load(const S* from, int width) const {
    Pack<S, n> p{};
    if constexpr (all_whole) {
      if (any(width)) p = load_pack<Pack<S, n>>(from, thread);
    } else {
      HQOD_UNROLL
      for (int j = 0; j < n; ++j) {
        if (at(j) < width) p.v[j] = from[at(j)];
      }
    }
    return p;
  }

  template <bool all_whole>
  HQOD_HD void store(const Pack<S, n>& p, S* to, int width) const {
    if constexpr (all_whole) {
      store_pack(p, to, thread);
    } else {
      HQOD_UNROLL
      for (int j = 0; j < n; ++j) {
        if (at(j) < width) to[at(j)] = p.v[j];
      }
    }
  }
};

// `clipped`: an activation comes first.
template <typename S, bool backward, int n_items, bool clipped>
struct FakeQuantKernel {
  using T = decltype(widen(S{}));
  // Elements of an access: 16 bytes in a row, four halves in a tile, where each has its own scale.
  static constexpr int kRowN = 16 / sizeof(S), kTileN = kRowN < 4 ? kRowN : 4;
  using RowPlaces = Places<S, kRowN>;
  using TilePlaces = Places<S, kTileN>;
  static constexpr int kThreads = kFakeQuantThreads, kPhases = backward ? 4 : 1;
  static constexpr int kStretch = kThreads * kTileN;
  static constexpr int kLanes = 32, kFewLanes = 4;  // add up a channel's sums, at first and then
  // So many blocks cost a few spilled registers, which was faster all the same.
  static constexpr int kBlocks = sizeof(S) == 8 ? 2 : backward && sizeof(S) == 2 ? 3 : 4;
  static constexpr int kRowPacks = backward && kRowN == 8 ? 2 : 4;  // loads in flight in a row
  static constexpr int kTilePacks = 2 * kRowN / kTileN;             // loads in flight in a tile
  struct Shared {
    T places[3][kStretch];  // each thread's own: its scales, and in the end its sums
    double lanes[backward ? 2 : 1][backward ? kThreads : 1];
  };
  using Local = Nothing;

  FakeQuantTable<n_items> table;

  // Fake-quantizes a value, or turns its upstream gradient into dx and adds to the sums.
  template <Ratio ratio>
  HQOD_HD static S element(S x, S dy, const QuantScale<T>& s, T& ds, T& dz) {
    S out;
    if constexpr (backward) {
      const T upstream = static_cast<T>(widen(dy));
      const FakeQuantGrad<T> g = fake_quant_grad<ratio, clipped>(widen(x), s, upstream);
      narrow(g.dx, out);
      ds = mul_add(upstream, g.slope, ds);
      dz += g.dz;
    } else {
      narrow(fake_quant<ratio, clipped>(widen(x), s), out);
    }
    return out;
  }

  HQOD_HD static const S* input(const void* from, int64_t at) {
    return static_cast<const S*>(from) + at;
  }

  HQOD_HD static S* output(const FakeQuantItem& item, int64_t at) {
    void* out = backward ? item.call.dx : item.call.y;
    return out == nullptr ? nullptr : static_cast<S*>(out) + at;
  }

  // Some stretches, all of whose loads come first. A scale for each place, or one for all. Places
  // of a cut vector that lie beyond the width count as 0 with a gradient of 0.
  template <bool all_whole, int packs, int n, int n_scales>
  HQOD_HD static void stretches_of(const FakeQuantItem& item, const Places<S, n>& places,
                                   const QuantScale<T> (&scales)[n_scales], T (&ds)[n_scales],
                                   T (&dz)[n_scales], int64_t start, int64_t stride,
                                   const int (&widths)[packs]) {
    Pack<S, n> x[packs], dy[packs];
    HQOD_UNROLL
    for (int i = 0; i < packs; ++i) {
      const int64_t at = start + i * stride;
      x[i] = places.template load<all_whole>(input(item.call.x, at), widths[i]);
      if constexpr (backward) {
        dy[i] = places.template load<all_whole>(input(item.call.dy, at), widths[i]);
      }
    }
    HQOD_UNROLL
    for (int i = 0; i < packs; ++i) {
      if (!places.any(widths[i])) continue;
      Pack<S, n> out;
      HQOD_UNROLL
      for (int j = 0; j < n; ++j) {
        const int k = n_scales == 1 ? 0 : j;
        out.v[j] = element<Ratio::kInverse>(x[i].v[j], backward ? dy[i].v[j] : S{}, scales[k],
                                            ds[k], dz[k]);
      }
      S* to = output(item, start + i * stride);
      if (to != nullptr) places.template store<all_whole>(out, to, widths[i]);
    }
  }

  // width_at(i): how much there is of stretch i.
  template <int packs, int n, int n_scales, typename F>
  HQOD_HD static void stretches(const FakeQuantItem& item, const Places<S, n>& places,
                                const QuantScale<T> (&scales)[n_scales], T (&ds)[n_scales],
                                T (&dz)[n_scales], int64_t start, int64_t stride, F&& width_at) {
    int widths[packs];
    bool whole = true;
    HQOD_UNROLL
    for (int i = 0; i < packs; ++i) {
      widths[i] = width_at(i);
      whole &= places.whole(widths[i]);
    }
    if (whole) {
      stretches_of<true>(item, places, scales, ds, dz, start, stride, widths);
      return;
    }
    HQOD_ROLL
    for (int i = 0; i < packs; ++i) {  // rolled: single values take a register each
      const int width[1] = {width_at(i)};
      stretches_of<false>(item, places, scales, ds, dz, start + i * stride, stride, width);
    }
  }

  // One element after the other, with a division: for scales that quotient() does not do.
  HQOD_HD static void divided(const FakeQuantItem& item, int64_t channel, int64_t start, int at,
                              int width, T& ds, T& dz) {
    if (at >= width) return;
    const S dy = backward ? *input(item.call.dy, start + at) : S{};
    const S out = element<Ratio::kDivided>(*input(item.call.x, start + at), dy,
                                           channel_scale<T>(item.call, channel), ds, dz);
    S* to = output(item, start + at);
    if (to != nullptr) *to = out;
  }

  // A unit of a row: its sums go to sums[0][thread] and sums[1][thread].
  HQOD_HD static void row(const FakeQuantItem& item, const FakeQuantUnit& unit, int thread,
                          T (&sums)[3][kStretch]) {
    const RowPlaces places{thread, item.vector};
    const QuantScale<T> scales[1] = {channel_scale<T>(item.call, unit.channel)};
    const int width = static_cast<int>(unit.width);
    constexpr int stretch = kThreads * kRowN;
    T ds[1] = {}, dz[1] = {};
    if (quotient_works(scales[0].scale)) {
      HQOD_ROLL
      for (int at = 0; at < width; at += kRowPacks * stretch) {
        stretches<kRowPacks>(item, places, scales, ds, dz, unit.start + at, stretch,
                             [=](int i) { return width - at - i * stretch; });
      }
    } else {
      HQOD_ROLL
      for (int at = places.at(0); at < width; at += stretch) {
        HQOD_ROLL
        for (int j = 0; j < kRowN; ++j) {
          divided(item, unit.channel, unit.start, at + j, width, ds[0], dz[0]);
        }
      }
    }
    if constexpr (backward) {
      sums[0][thread] = ds[0];
      sums[1][thread] = dz[0];
    }
  }

  HQOD_HD static int64_t channel_of(const FakeQuantItem& item, const FakeQuantUnit& unit, int at) {
    const uint32_t index = static_cast<uint32_t>(at) / static_cast<uint32_t>(item.layout.inner);
    const uint32_t channels = static_cast<uint32_t>(item.layout.channels);
    const uint32_t first = static_cast<uint32_t>(unit.channel);
    if (item.layout.tiles == 1) return index % channels;
    return first + index < channels ? first + index : channels - 1;  // none but beyond the width
  }

  // How much of a tile there is at a step.
  HQOD_HD static int width_of(const FakeQuantItem& item, const FakeQuantUnit& unit, int step) {
    if (step >= unit.steps) return 0;
    const int64_t left = item.layout.numel - unit.start - step * item.layout.stride;
    return static_cast<int>(left < unit.width ? left : unit.width);
  }

  // A unit of a tile: the sums of each place go to the thread's own slots.
  HQOD_HD static void tile(const FakeQuantItem& item, const FakeQuantUnit& unit, int thread,
                           T (&slots)[3][kStretch]) {
    const int at_once = item.at_once, threads = kThreads / at_once, first = thread / threads;
    constexpr int n = kTileN;
    const TilePlaces places{thread % threads, item.vector};
    const int own = first * threads * n;
    bool works = true;
    HQOD_ROLL
    for (int j = 0; j < n; ++j) {  // rolled, so that its registers are few
      const int64_t channel = channel_of(item, unit, places.at(j));
      const T zero = channel_zero<T>(item.call, channel);
      const T given = read_one<T>(item.call.param_dtype, item.call.scale, channel);
      const T scale = quant_scale(item.call, given, T(1), zero).scale;
      works &= quotient_works(scale);
      slots[0][own + places.at(j)] = scale;
      slots[1][own + places.at(j)] = T(1) / scale;
      slots[2][own + places.at(j)] = zero;
    }
    const int64_t stride = item.layout.stride;
    if (works) {
      QuantScale<T> scales[n];
      T ds[n] = {}, dz[n] = {};
      HQOD_UNROLL
      for (int j = 0; j < n; ++j) {
        const int slot = own + places.at(j);
        scales[j] = quant_scale(item.call, slots[0][slot], slots[1][slot], slots[2][slot]);
      }
      HQOD_ROLL
      for (int k = first; k < unit.steps; k += kTilePacks * at_once) {
        stretches<kTilePacks>(item, places, scales, ds, dz, unit.start + k * stride,
                              at_once * stride,
                              [&](int i) { return width_of(item, unit, k + i * at_once); });
      }
      if constexpr (backward) {
        HQOD_UNROLL
        for (int j = 0; j < n; ++j) {
          slots[0][own + places.at(j)] = ds[j];
          slots[1][own + places.at(j)] = dz[j];
        }
      }
      return;
    }
    HQOD_ROLL
    for (int j = 0; j < n; ++j) {
      const int64_t channel = channel_of(item, unit, places.at(j));
      T ds = T(0), dz = T(0);
      HQOD_ROLL
      for (int k = first; k < unit.steps; k += at_once) {
        const int width = width_of(item, unit, k);
        divided(item, channel, unit.start + k * stride, places.at(j), width, ds, dz);
      }
      slots[0][own + places.at(j)] = ds;
      slots[1][own + places.at(j)] = dz;
    }
  }

  // Which of a tile's places belong to a channel: place k of channel c is
  // (k / inner / periods) span + (k / inner % periods) period + c inner + k % inner.
  struct Segments {
    int channels;  // in the unit
    int count;     // places of a channel
    int inner, periods, period, span;
    int lanes;  // threads that add up a channel

    HQOD_HD Segments(const FakeQuantItem& item, const FakeQuantUnit& unit) {
      const FakeQuantLayout& l = item.layout;
      inner = static_cast<int>(l.inner);
      channels = static_cast<int>(l.tiles == 1 ? l.channels : unit.width / l.inner);
      period = channels * inner;
      periods = static_cast<int>(unit.width) / period;
      span = kStretch / item.at_once;
      count = item.at_once * periods * inner;
      lanes = kLanes;
      while (lanes > 1 && lanes * channels > kThreads) lanes /= 2;
    }

    HQOD_HD int place(int channel, int k) const {
      if (k < inner) return channel * inner + k;  // often all of them: no division
      const int row = k / inner;
      return row / periods * span + row % periods * period + channel * inner + k % inner;
    }
  };

  HQOD_HD static void* gradient_of(const FakeQuantItem& item, int which) {
    return which == 0 ? item.call.d_scale : item.call.d_zero_point;
  }

  HQOD_HD static void emit(const FakeQuantItem& item, const FakeQuantUnit& unit, int channel,
                           int which, double sum) {
    const FakeQuantCall& call = item.call;
    const int64_t c = unit.channel + channel;
    void* gradient = gradient_of(item, which);
    if (gradient == nullptr) return;
    if (item.layout.blocks == 1) {
      write_one(call.param_dtype, gradient, c, sum * call.factor);
    } else {
      void* sums = which == 0 ? call.scale_sums : call.zero_point_sums;
      static_cast<T*>(sums)[unit.block * call.channels + c] = static_cast<T>(sum);
    }
  }

  // The sums of a row, of a number of places that is known: loads need not wait for one another.
  template <int phase>
  HQOD_HD static void add_up_row(const FakeQuantItem& item, const FakeQuantUnit& unit, int thread,
                                 Shared& shared) {
    constexpr int before = phase == 1 ? kThreads : phase == 2 ? kLanes : kFewLanes;
    constexpr int after = phase == 1 ? kLanes : phase == 2 ? kFewLanes : 1;
    const int which = thread / after, lane = thread % after;
    if (which > 1 || gradient_of(item, which) == nullptr) return;
    double sum = 0;
    HQOD_UNROLL
    for (int i = 0; i < before / after; ++i) {
      const int from = lane + i * after;
      if constexpr (phase == 1) {
        sum += shared.places[which][from];
      } else {
        sum += shared.lanes[which][from];  // none but this thread's, which then writes the first
      }
    }
    if constexpr (phase < 3) {
      shared.lanes[which][lane] = sum;
    } else {
      emit(item, unit, 0, which, sum);
    }
  }

  // The sums of a tile's channels, each by as many lanes as there are threads for.
  template <int phase>
  HQOD_HD static void add_up_tile(const FakeQuantItem& item, const FakeQuantUnit& unit, int thread,
                                  Shared& shared) {
    const Segments segments(item, unit);
    const int lanes = segments.lanes, lane = thread % lanes, first = thread / lanes;
    const int few = lanes < kFewLanes ? lanes : kFewLanes;
    const int after = phase == 1 ? lanes : phase == 2 ? few : 1;
    if (lane >= after || (phase > 1 && (lanes == 1 || first >= segments.channels))) return;
    HQOD_ROLL
    for (int which = 0; which < 2; ++which) {
      if (gradient_of(item, which) == nullptr) continue;
      if constexpr (phase == 1) {
        for (int c = first; c < segments.channels; c += kThreads / lanes) {
          double sum = 0;
          for (int k = lane; k < segments.count; k += lanes) {
            sum += shared.places[which][segments.place(c, k)];
          }
          if (lanes == 1) {
            emit(item, unit, c, which, sum);
          } else {
            shared.lanes[which][thread] = sum;
          }
        }
      } else {
        const int before = phase == 2 ? lanes : few;
        double sum = 0;
        for (int i = lane; i < before; i += after) sum += shared.lanes[which][thread - lane + i];
        if constexpr (phase == 2) {
          shared.lanes[which][thread] = sum;
        } else {
          emit(item, unit, first, which, sum);
        }
      }
    }
  }

  template <int phase>
  HQOD_HD void run(int64_t block, int thread, Shared& shared, Local&) const {
    const FakeQuantItem& item = table.items[find_item(table, static_cast<uint32_t>(block))];
    const FakeQuantUnit unit = fake_quant_unit<uint32_t>(item.layout, block - item.first_unit);
    if constexpr (phase == 0) {
      if (item.layout.rows) {
        row(item, unit, thread, shared.places);
      } else {
        tile(item, unit, thread, shared.places);
      }
    } else if (item.layout.rows) {
      add_up_row<phase>(item, unit, thread, shared);
    } else {
      add_up_tile<phase>(item, unit, thread, shared);
    }
  }
};

HQOD_MATH_END
