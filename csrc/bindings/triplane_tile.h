#pragma once

#include "bindings/triplane.h"
#include "dreamfusion_fast/triplane_tile.h"

namespace dff::bindings {

template <>
struct FromPython<TriplaneTile>
    : FromTuple<TriplaneTile, &TriplaneTile::shape, &TriplaneTile::count, &TriplaneTile::positions> {};

inline void bind_triplane_tile(py::module_& module) {
  using Encode = TriplaneTileEncode;
  def(module, "triplane_tile_encode", &backend::triplane_tile_encode, &Encode::tile, &Encode::planes,
      &Encode::planes_type, &Encode::direction, &Encode::output);

  using ToPosition = TriplaneTilePositionGradient;  // Python gives no direction: it never differentiates a tile twice
  def(module, "triplane_tile_position_gradient", &backend::triplane_tile_position_gradient, &ToPosition::tile,
      &ToPosition::planes, &ToPosition::planes_type, &ToPosition::grad_features, &ToPosition::gradient);

  using Scatter = TriplaneTileScatter;
  def(module, "triplane_tile_scatter", &backend::triplane_tile_scatter, &Scatter::tile, &Scatter::grad_features,
      &Scatter::direction, &Scatter::grad_derivative, &Scatter::grad_planes, &Scatter::samples_per_thread);
}

}  // namespace dff::bindings
