#pragma once

#include "bindings/hash_grid.h"
#include "dreamfusion_fast/hash_grid_tile.h"

namespace dff::bindings {

template <>
struct FromPython<HashGridTile>
    : FromTuple<HashGridTile, &HashGridTile::levels, &HashGridTile::count, &HashGridTile::positions> {};

inline void bind_hash_grid_tile(py::module_& module) {
  using Encode = HashGridTileEncode;
  def(module, "hash_grid_tile_encode", &backend::hash_grid_tile_encode, &Encode::tile, &Encode::table,
      &Encode::table_type, &Encode::direction, &Encode::output, &Encode::levels_per_thread);

  using ToPosition = HashGridTilePositionGradient;  // Python gives no direction: it never differentiates a tile twice
  def(module, "hash_grid_tile_position_gradient", &backend::hash_grid_tile_position_gradient, &ToPosition::tile,
      &ToPosition::table, &ToPosition::table_type, &ToPosition::grad_features, &ToPosition::gradient,
      &ToPosition::levels_per_launch);

  using Scatter = HashGridTileScatter;
  def(module, "hash_grid_tile_scatter", &backend::hash_grid_tile_scatter, &Scatter::tile, &Scatter::grad_features,
      &Scatter::direction, &Scatter::grad_derivative, &Scatter::grad_table, &Scatter::samples_per_thread);
}

}  // namespace dff::bindings
