// Which element of a dense tensor belongs to which channel, and how its memory is cut into units.
//
// In memory order a tensor with a channel axis is [outer, channels, inner]; without one it is
// [1, 1, numel]. A unit is what one partial sum of the scale's gradient is taken over; units are
// fixed by the shape alone, so sums do not depend on the number of threads.
//
// - Rows (inner >= kRowMin): a unit is up to kUnit elements of one row, which has one channel.
// - Tiles: a row is too short for a vector loop. A tile is up to kTile consecutive elements whose
//   channels are the same at every step; a unit is a tile at up to kTileSteps steps. With whole
//   periods (channels * inner) shorter than a tile, a tile holds several and a step is a tile;
//   otherwise a period is cut into tiles of whole channels and a step is a period.
#pragma once

#include "math/config.h"

HQOD_MATH_BEGIN

inline constexpr int64_t kUnit = 16384, kTile = 1024, kTileSteps = 64, kRowMin = 192;

struct FakeQuantLayout {
  int64_t outer, channels, inner, numel;
  bool rows;
  int64_t per_row;  // rows: units of a row
  int64_t tile;     // tiles: elements of a tile
  int64_t tiles;    // tiles: tiles of a step
  int64_t stride;   // tiles: elements from one step to the next
  int64_t steps;    // tiles: number of steps
  int64_t blocks;   // partial sums of a channel: the sums are [blocks, channels]
  int64_t units;
};

struct FakeQuantUnit {
  int64_t block;          // row of the partial sums
  int64_t channel;        // its first channel
  int64_t start;          // first element in memory
  int64_t width;          // elements of a step
  int64_t steps, stride;  // and how they repeat; the last step may be cut by the tensor's end
};

HQOD_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

HQOD_HD FakeQuantLayout fake_quant_layout(int64_t outer, int64_t channels, int64_t inner) {
  FakeQuantLayout l{outer, channels, inner, outer * channels * inner, false, 0, 0, 0, 0, 0, 0, 0};
  if (l.numel == 0) return l;
  l.rows = channels == 1 || inner >= kRowMin;
  if (l.rows) {
    if (channels == 1) {
      l.inner = outer * inner;
      l.outer = 1;
    }
    l.per_row = ceil_div(l.inner, kUnit);
    l.blocks = l.outer * l.per_row;
    l.units = l.blocks * channels;
    return l;
  }
  const int64_t period = channels * inner;
  if (period <= kTile) {
    l.tile = (kTile / period) * period;
    l.tiles = 1;
    l.stride = l.tile;
    l.steps = ceil_div(outer * period, l.tile);
  } else {
    l.tile = (kTile / inner) * inner;
    l.tiles = ceil_div(period, l.tile);
    l.stride = period;
    l.steps = outer;
  }
  l.blocks = ceil_div(l.steps, kTileSteps);
  l.units = l.blocks * l.tiles;
  return l;
}

HQOD_HD FakeQuantUnit fake_quant_unit(const FakeQuantLayout& l, int64_t index) {
  FakeQuantUnit u{};
  if (l.rows) {
    const int64_t row = index / l.per_row, part = index % l.per_row;
    u.channel = row % l.channels;
    u.block = (row / l.channels) * l.per_row + part;
    u.start = row * l.inner + part * kUnit;
    u.width = l.inner - part * kUnit < kUnit ? l.inner - part * kUnit : kUnit;
    u.steps = 1;
    return u;
  }
  u.block = index / l.tiles;
  const int64_t tile = index % l.tiles, first = u.block * kTileSteps;
  u.channel = tile * (l.tile / l.inner);
  u.start = first * l.stride + tile * l.tile;
  const int64_t left = l.stride - tile * l.tile;
  u.width = left < l.tile ? left : l.tile;
  u.steps = l.steps - first < kTileSteps ? l.steps - first : kTileSteps;
  u.stride = l.stride;
  return u;
}

HQOD_MATH_END
