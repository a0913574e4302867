// The occupancy grid: a running maximum of the density in each cell of the scene box, and its threshold as one bit
// each.
#pragma once

#include <cstring>

#include "dreamfusion_fast/common.h"

namespace dff {

// The larger of two values of which a NaN is not known; NaN where neither is.
DFF_HD float larger_known(float a, float b) { return a > b || b != b ? a : b; }

// A cell below 0 is out of sight of all cameras, and stays as it is.
DFF_HD bool cell_stays(float value) { return value < 0.0f; }

// An update of the grid. As a function it is the first half: what each listed cell becomes, read from the old grid.
// That is not written back at once, because a cell listed twice would then decay twice.
struct OccupancyUpdate {
  float* grid;           // [n_cells]
  const int64_t* cells;  // [n] flat index (x * R + y) * R + z; nullptr: all cells in order, n = n_cells
  const float* density;  // [n]
  float* decayed;  // [n] larger_known(grid * decay, density), or grid where it is below 0; may be grid itself where
                   // cells is nullptr
  float decay;
  int64_t n;
  int64_t n_cells;

  DFF_HD void operator()(int64_t i) const {
    const int64_t cell = cells == nullptr ? i : cells[i];
    if (cell < 0 || cell >= n_cells) return;
    const float value = grid[cell];
    const float seen = density[i] < 0.0f ? 0.0f : density[i];  // a NaN stays one
    decayed[i] = cell_stays(value) ? value : larger_known(seen, value * decay);
  }
};

// Makes the listed cells unknown, for the maxima of the second half: a NaN whose bits lie below all numbers' in the
// order in which the GPU compares them.
struct OccupancyClear {
  OccupancyUpdate update;

  DFF_HD void operator()(int64_t i) const {
    const int64_t cell = update.cells[i];
    const uint32_t unknown = 0xffffffffu;
    if (cell >= 0 && cell < update.n_cells) std::memcpy(&update.grid[cell], &unknown, sizeof unknown);
  }
};

struct OccupancyPack {
  const float* grid;       // [n_cells]
  const float* threshold;  // [1]
  uint8_t* bits;           // [ceil(n_cells / 8)] bit i of byte b is cell 8 b + i: grid > threshold
  int64_t n_cells;

  DFF_HD void operator()(int64_t byte) const {
    unsigned value = 0;
    for (int bit = 0; bit < 8; ++bit) {
      const int64_t cell = 8 * byte + bit;
      if (cell < n_cells && grid[cell] > *threshold) value |= 1u << bit;
    }
    bits[byte] = static_cast<uint8_t>(value);
  }
};

// Both halves.
DFF_LAUNCHER(Status occupancy_update(const OccupancyUpdate& op, const Launch& launch);)
DFF_LAUNCHER(Status occupancy_pack(const OccupancyPack& op, const Launch& launch);)

}  // namespace dff
