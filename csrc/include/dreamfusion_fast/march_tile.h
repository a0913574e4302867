// The march's samples of one tile of the streaming renderer: a window of the packed samples, found again by marching
// the rays that lie in it. So nothing per sample is held between the tiles, nor between forward and backward.
#pragma once

#include "dreamfusion_fast/march.h"
#include "dreamfusion_fast/view.h"

namespace dff {

template <typename T>
struct MarchBox {
  T low[3];     // the low corner
  T extent[3];  // the sides
};

template <typename T>
struct MarchTile {
  MarchRays<T> rays;
  const int32_t* firsts;     // [n_rays], from MarchCount
  const int32_t* offsets;    // [n_rays + 1], prefix sum of the counts, or of fewer: then each ray's first samples, or
                             // those that are kept
  const int32_t* marched;    // [n_rays + 1], prefix sum of MarchCount's counts, to find a sample in `kept`
  const uint8_t* kept;       // [marched samples], whether each is wanted; nullptr: all are
  const int32_t* ray_range;  // [2], the rays with samples in this tile: first, and one past the last
  T* t;                      // [capacity], out
  T* lengths;                // [capacity], out; nullptr without distances
  View<T> positions;         // [capacity, 3], out, in the box below scaled to [0, 1]^3
  MarchBox<T> box;           // of the field that is asked; the grid may have another
  int64_t first;             // the tile's samples are first <= i < first + capacity
  int64_t capacity;

  // Where the samples of a ray start in this tile, and where they end; negative starts lie in tiles before.
  DFF_HD int64_t start(int64_t ray) const { return offsets[ray] - first; }
  DFF_HD int64_t end(int64_t ray) const {
    const int64_t stop = offsets[ray + 1] - first;
    return stop < capacity ? stop : capacity;
  }

  template <bool kWide>
  DFF_HD void write(const RayMarcher<T, kWide>& marcher, int64_t ray, int64_t slot, int32_t k, T distance) const {
    t[slot] = distance;
    if (kWide && lengths != nullptr) lengths[slot] = marcher.length(k);
    for (int axis = 0; axis < 3; ++axis) {
      const T position = rays.origins[3 * ray + axis] + distance * rays.directions[3 * ray + axis];
      positions(slot, axis) = (position - box.low[axis]) / box.extent[axis];
    }
  }

  template <bool kWide>
  DFF_HD void march(int64_t ray) const {
    int64_t slot = start(ray);
    const int64_t stop = end(ray);
    if (slot >= stop) return;
    const RayMarcher<T, kWide> marcher(rays, ray);
    const uint8_t* wanted = kept == nullptr ? nullptr : kept + marched[ray];
    marcher.each_sample(firsts[ray], [&](int32_t k, T distance) {
      if (wanted != nullptr && !*wanted++) return true;
      if (slot >= 0) write(marcher, ray, slot, k, distance);
      return ++slot < stop;
    });
  }
};

// How many samples all rays have together, and how many rays cannot be rendered at all.
template <typename T>
struct MarchTotals {
  const int32_t* counts;  // [n_rays]
  const T* origins;       // [n_rays, 3]
  const T* directions;    // [n_rays, 3]
  T tolerance;            // how far the square of a direction's length may be off 1
  int64_t* totals;        // [2] samples, invalid rays; added to
  int64_t n_rays;

  DFF_HD bool invalid(int64_t ray) const {
    T squared = 0, finite = 0;
    for (int axis = 0; axis < 3; ++axis) {
      const T direction = directions[3 * ray + axis], origin = origins[3 * ray + axis];
      squared += direction * direction;
      finite += origin - origin;  // NaN of what is not finite
    }
    const T off = squared - T(1);
    return !(off <= tolerance && off >= -tolerance && finite == T(0));
  }
};

// What the kernels of a tile read about it: [n_tiles, kTileColumns], a row per tile.
constexpr int kTileColumns = 8;
constexpr int kTileRays = 0;   // the rays with samples in it: first, and one past the last
constexpr int kTileCount = 4;  // its samples; aligned to 16 bytes, which some compilers ask about

struct TileTable {
  const int32_t* offsets;  // [n_rays + 1]
  int32_t* table;          // [n_tiles, kTileColumns], out
  int64_t n_rays;
  int64_t size;  // samples per tile
  int64_t n_tiles;

  // The number of elements of a rising array that are less than `value`, or with kOrEqual not above it.
  template <bool kOrEqual>
  DFF_HD static int64_t before(const int32_t* values, int64_t n, int64_t value) {
    int64_t low = 0, high = n;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (kOrEqual ? values[middle] <= value : values[middle] < value) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  DFF_HD void operator()(int64_t tile) const {
    const int64_t first = tile * size;
    const int64_t left = offsets[n_rays] - first;
    int32_t* row = table + tile * kTileColumns;
    // The first ray that ends behind the start, and the first one that begins at the end or behind it.
    row[kTileRays] = static_cast<int32_t>(before<true>(offsets + 1, n_rays, first));
    row[kTileRays + 1] = static_cast<int32_t>(before<false>(offsets, n_rays, first + size));
    row[kTileCount] = static_cast<int32_t>(left < 0 ? 0 : left < size ? left : size);
  }
};

DFF_LAUNCHER(template <typename T> Status march_totals(const MarchTotals<T>& op, const Launch& launch);)
DFF_LAUNCHER(Status tile_table(const TileTable& op, const Launch& launch);)
DFF_LAUNCHER(template <typename T> Status march_tile(const MarchTile<T>& op, const Launch& launch);)

}  // namespace dff
