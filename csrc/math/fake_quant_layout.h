// Which element of a dense tensor belongs to which channel, and how its memory is cut into units.
//
// In memory order a tensor with a channel axis is [outer, channels, inner]; without one it is
// [1, 1, numel]. A unit is what one partial sum of the scale's gradient is taken over; units are
// fixed by the shape alone, so sums do not depend on the number of threads.
//
// - Rows: a unit is up to `unit` elements of one row, which has one channel.
// - Tiles: a row is too short for that. A tile is up to `tile` consecutive elements whose channels
//   are the same at every step; a unit is a tile at up to `tile_steps` steps. With whole periods
//   (channels * inner) shorter than a tile, a tile holds several and a step is a tile; otherwise a
//   period is cut into tiles of whole channels and a step is a period. Where they can be, tiles are
//   a whole number of vectors.
#pragma once

#include "math/config.h"

HQOD_MATH_BEGIN

// How a device wants its units. Part of what its results are: sums are rounded accordingly.
struct FakeQuantTuning {
  int64_t unit, tile, tile_steps;
  int64_t row_min;  // rows of this many elements are not tiled
  int64_t vector;   // elements of a vector access
};

struct FakeQuantLayout {
  int64_t outer, channels, inner, numel;
  bool rows;
  int64_t unit;        // rows: elements of a unit
  int64_t per_row;     // rows: units of a row
  int64_t tile;        // tiles: elements of a tile
  int64_t tiles;       // tiles: tiles of a step
  int64_t stride;      // tiles: elements from one step to the next
  int64_t steps;       // tiles: number of steps
  int64_t tile_steps;  // tiles: steps of a unit
  int64_t blocks;      // partial sums of a channel: the sums are [blocks, channels]
  int64_t units;
};

struct FakeQuantUnit {
  int64_t block;    // row of the partial sums
  int64_t channel;  // its first channel
  int64_t start;    // first element in memory
  int64_t width;    // elements of a step
  int64_t steps;    // how they repeat; the last step may be cut by the tensor's end
};

HQOD_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As many elements as fit into a tile: a multiple of base, and of the vector if that fits too.
HQOD_HD int64_t tile_of(int64_t base, const FakeQuantTuning& t) {
  int64_t factor = t.vector;  // vector / gcd(base, vector), a power of two
  while (factor > 1 && (base * factor / 2) % t.vector == 0) factor /= 2;
  const int64_t whole = base * factor <= t.tile ? base * factor : base;
  return t.tile / whole * whole;
}

HQOD_HD FakeQuantLayout fake_quant_layout(int64_t outer, int64_t channels, int64_t inner,
                                          const FakeQuantTuning& t) {
  FakeQuantLayout l{};
  l.outer = outer;
  l.channels = channels;
  l.inner = inner;
  l.numel = outer * channels * inner;
  l.unit = t.unit;
  l.tile_steps = t.tile_steps;
  if (l.numel == 0) return l;
  l.rows = channels == 1 || inner >= t.row_min;
  if (l.rows) {
    if (channels == 1) {
      l.inner = outer * inner;
      l.outer = 1;
    }
    l.per_row = ceil_div(l.inner, l.unit);
    l.blocks = l.outer * l.per_row;
    l.units = l.blocks * channels;
    return l;
  }
  const int64_t period = channels * inner;
  if (period <= t.tile) {
    l.tile = tile_of(period, t);
    l.tiles = 1;
    l.stride = l.tile;
    l.steps = ceil_div(outer * period, l.tile);
  } else {
    l.tile = tile_of(inner, t);
    l.tiles = ceil_div(period, l.tile);
    l.stride = period;
    l.steps = outer;
  }
  l.blocks = ceil_div(l.steps, l.tile_steps);
  l.units = l.blocks * l.tiles;
  return l;
}

// Index is the type that the divisions are made in: it must hold l.units.
template <typename Index = int64_t>
HQOD_HD FakeQuantUnit fake_quant_unit(const FakeQuantLayout& l, int64_t index) {
  const auto divisor = [](int64_t x) { return static_cast<Index>(x); };
  const Index i = static_cast<Index>(index);
  FakeQuantUnit u{};
  if (l.rows) {
    const Index row = i / divisor(l.per_row);
    const int64_t part = i % divisor(l.per_row), at = part * l.unit;
    u.channel = row % divisor(l.channels);
    u.block = (row / divisor(l.channels)) * l.per_row + part;
    u.start = row * l.inner + at;
    u.width = l.inner - at < l.unit ? l.inner - at : l.unit;
    u.steps = 1;
    return u;
  }
  u.block = i / divisor(l.tiles);
  const int64_t at = (i % divisor(l.tiles)) * l.tile, first = u.block * l.tile_steps;
  u.channel = at / l.inner;
  u.start = first * l.stride + at;
  u.width = l.stride - at < l.tile ? l.stride - at : l.tile;
  u.steps = l.steps - first < l.tile_steps ? l.steps - first : l.tile_steps;
  return u;
}

HQOD_MATH_END
