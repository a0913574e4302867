#pragma once

#include "bindings/bind.h"
#include "dreamfusion_fast/march_tile.h"

namespace dff::bindings {

template <typename T>
struct FromPython<MarchRays<T>> {
  using Rays = MarchRays<T>;
  using Members =
      FromTuple<Rays, &Rays::origins, &Rays::directions, &Rays::t_near, &Rays::t_far, &Rays::aabb, &Rays::distances,
                &Rays::n_steps, &Rays::bitfield, &Rays::blocks, &Rays::resolution, &Rays::cascades, &Rays::step,
                &Rays::jitter, &Rays::seed, &Rays::seed_offset, &Rays::n_rays>;
  using Type = typename Members::Type;
  static void read(const Type& values, Rays& rays) {
    Members::read(values, rays);
    rays.take_whole_grid();
  }
};

// Comes as (xmin, ymin, zmin, xmax, ymax, zmax).
template <typename T>
struct FromPython<MarchBox<T>> {
  using Type = std::array<double, 6>;
  static void read(const Type& corners, MarchBox<T>& box) {
    for (int axis = 0; axis < 3; ++axis) {
      box.low[axis] = static_cast<T>(corners[axis]);
      box.extent[axis] = static_cast<T>(corners[axis + 3] - corners[axis]);
    }
  }
};

template <typename T>
void bind_march(py::module_& module) {
  using Count = MarchCount<T>;
  def(module, "march_count" + kSuffix<T>, &backend::march_count<T>, &Count::rays, &Count::counts, &Count::firsts);

  using Write = MarchWrite<T>;
  def(module, "march_write" + kSuffix<T>, &backend::march_write<T>, &Write::rays, &Write::firsts, &Write::offsets,
      &Write::t, &Write::lengths, &Write::ray_indices, &Write::capacity);

  using Tile = MarchTile<T>;
  def(module, "march_tile" + kSuffix<T>, &backend::march_tile<T>, &Tile::rays, &Tile::firsts, &Tile::offsets,
      &Tile::marched, &Tile::kept, &Tile::ray_range, &Tile::t, &Tile::lengths, &Tile::positions, &Tile::box,
      &Tile::first, &Tile::capacity);

  using Totals = MarchTotals<T>;
  def(module, "march_totals" + kSuffix<T>, &backend::march_totals<T>, &Totals::counts, &Totals::origins,
      &Totals::directions, &Totals::tolerance, &Totals::totals, &Totals::n_rays);
}

// What reads no rays.
inline void bind_march_grid(py::module_& module) {
  using Blocks = MarchBlocks;
  def(module, "march_blocks", &backend::march_blocks, &Blocks::bitfield, &Blocks::resolution, &Blocks::cascades,
      &Blocks::blocks);

  using Table = TileTable;
  def(module, "tile_table", &backend::tile_table, &Table::offsets, &Table::table, &Table::n_rays, &Table::size,
      &Table::n_tiles);
}

}  // namespace dff::bindings
