#pragma once

#include "bindings/bind.h"
#include "dreamfusion_fast/hash_grid.h"

namespace dff::bindings {

template <>
struct FromPython<HashGridLevels>
    : FromTuple<HashGridLevels, &HashGridLevels::level_offsets, &HashGridLevels::resolutions,
                &HashGridLevels::placements, &HashGridLevels::n_rows, &HashGridLevels::n_samples,
                &HashGridLevels::n_levels, &HashGridLevels::n_features, &HashGridLevels::smoothstep> {};

template <typename T>
void bind_hash_grid(py::module_& module) {
  using Encode = HashGridEncode<T>;
  def(module, "hash_grid_encode" + kSuffix<T>, &backend::hash_grid_encode<T>, &Encode::levels, &Encode::direction,
      &Encode::positions, &Encode::table, &Encode::output);

  using ToTable = HashGridTableGradient<T>;
  def(module, "hash_grid_table_gradient" + kSuffix<T>, &backend::hash_grid_table_gradient<T>, &ToTable::levels,
      &ToTable::direction, &ToTable::grad_output, &ToTable::positions, &ToTable::grad_table);

  using ToPosition = HashGridPositionGradient<T>;
  def(module, "hash_grid_position_gradient" + kSuffix<T>, &backend::hash_grid_position_gradient<T>, &ToPosition::levels,
      &ToPosition::direction, &ToPosition::grad_output, &ToPosition::positions, &ToPosition::table,
      &ToPosition::gradient);
}

}  // namespace dff::bindings
