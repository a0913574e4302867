#pragma once

#include <tuple>

#include "bindings/hash_grid.h"
#include "dreamfusion_fast/hash_grid_tile.h"

namespace dff {
namespace bindings {

// Address, sample stride, channel stride, ElementType; address 0 for none.
using TileArrayArguments = std::tuple<Address, uint32_t, uint32_t, int32_t>;

inline TileArray tile_array(const TileArrayArguments& arguments) {
  TileArray array;
  array.data = pointer<void>(std::get<0>(arguments));
  array.sample_stride = std::get<1>(arguments);
  array.channel_stride = std::get<2>(arguments);
  array.type = static_cast<ElementType>(std::get<3>(arguments));
  return array;
}

inline HashGridTile hash_grid_tile(const TileArrayArguments& positions, Address count, Address level_offsets,
                                   Address resolutions, int64_t n_rows, int64_t n_samples, int32_t n_levels,
                                   int32_t n_features, bool smoothstep) {
  HashGridTile tile;
  tile.levels = hash_grid_levels(level_offsets, resolutions, n_rows, n_samples, n_levels, n_features, smoothstep);
  tile.count = pointer<const int32_t>(count);
  tile.positions = tile_array(positions);
  return tile;
}

inline void hash_grid_tile_encode(const TileArrayArguments& direction, Address table, int32_t table_type,
                                  const TileArrayArguments& output, int32_t levels_per_thread,
                                  const TileArrayArguments& positions, Address count, Address level_offsets,
                                  Address resolutions, int64_t n_rows, int64_t n_samples, int32_t n_levels,
                                  int32_t n_features, bool smoothstep, std::uintptr_t where) {
  HashGridTileEncode op;
  op.tile =
      hash_grid_tile(positions, count, level_offsets, resolutions, n_rows, n_samples, n_levels, n_features, smoothstep);
  op.table = pointer<const void>(table);
  op.table_type = static_cast<ElementType>(table_type);
  op.direction = tile_array(direction);
  op.output = tile_array(output);
  op.levels_per_thread = levels_per_thread;
  check("hash_grid_tile", backend::hash_grid_tile_encode(op, launch_at(where)));
}

inline void hash_grid_tile_position_gradient(const TileArrayArguments& grad_features, Address table, int32_t table_type,
                                             const TileArrayArguments& gradient, int32_t levels_per_launch,
                                             const TileArrayArguments& positions, Address count, Address level_offsets,
                                             Address resolutions, int64_t n_rows, int64_t n_samples, int32_t n_levels,
                                             int32_t n_features, bool smoothstep, std::uintptr_t where) {
  HashGridTilePositionGradient op;
  op.tile =
      hash_grid_tile(positions, count, level_offsets, resolutions, n_rows, n_samples, n_levels, n_features, smoothstep);
  op.table = pointer<const void>(table);
  op.table_type = static_cast<ElementType>(table_type);
  op.grad_features = tile_array(grad_features);  // and no direction: nothing here differentiates by positions twice
  op.gradient = tile_array(gradient);
  op.levels_per_launch = levels_per_launch;
  check("hash_grid_tile", backend::hash_grid_tile_position_gradient(op, launch_at(where)));
}

inline void hash_grid_tile_scatter(const TileArrayArguments& grad_features, const TileArrayArguments& direction,
                                   const TileArrayArguments& grad_of_along, Address grad_table,
                                   int32_t samples_per_thread, const TileArrayArguments& positions, Address count,
                                   Address level_offsets, Address resolutions, int64_t n_rows, int64_t n_samples,
                                   int32_t n_levels, int32_t n_features, bool smoothstep, std::uintptr_t where) {
  HashGridTileScatter op;
  op.tile =
      hash_grid_tile(positions, count, level_offsets, resolutions, n_rows, n_samples, n_levels, n_features, smoothstep);
  op.grad_features = tile_array(grad_features);
  op.direction = tile_array(direction);
  op.grad_of_along = tile_array(grad_of_along);
  op.grad_table = pointer<void>(grad_table);
  op.samples_per_thread = samples_per_thread;
  check("hash_grid_tile", backend::hash_grid_tile_scatter(op, launch_at(where)));
}

inline void bind_hash_grid_tile(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  module.def("hash_grid_tile_encode", &hash_grid_tile_encode, unlocked);
  module.def("hash_grid_tile_position_gradient", &hash_grid_tile_position_gradient, unlocked);
  module.def("hash_grid_tile_scatter", &hash_grid_tile_scatter, unlocked);
}

}  // namespace bindings
}  // namespace dff
