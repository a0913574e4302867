#pragma once

#include "bindings/bind.h"
#include "dreamfusion_fast/occupancy.h"

namespace dff::bindings {

inline void bind_occupancy(py::module_& module) {
  using Update = OccupancyUpdate;
  def(module, "occupancy_update", &backend::occupancy_update, &Update::grid, &Update::cells, &Update::density,
      &Update::decayed, &Update::decay, &Update::n, &Update::n_cells);

  using Pack = OccupancyPack;
  def(module, "occupancy_pack", &backend::occupancy_pack, &Pack::grid, &Pack::threshold, &Pack::bits, &Pack::n_cells);
}

}  // namespace dff::bindings
