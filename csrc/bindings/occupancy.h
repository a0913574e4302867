#pragma once

#include "bindings/bind.h"
#include "dreamfusion_fast/occupancy.h"

namespace dff {
namespace bindings {

inline void occupancy_update(Address grid, Address cells, Address density, Address decayed, double decay, int64_t n,
                             int64_t n_cells, std::uintptr_t where) {
  OccupancyDecay op;
  op.grid = pointer<const float>(grid);
  op.cells = pointer<const int64_t>(cells);
  op.density = pointer<const float>(density);
  op.decayed = pointer<float>(decayed);
  op.decay = static_cast<float>(decay);
  op.n = n;
  op.n_cells = n_cells;
  check("occupancy_update", backend::occupancy_update(pointer<float>(grid), op, launch_at(where)));
}

inline void occupancy_pack(Address grid, Address threshold, Address bits, int64_t n_cells, std::uintptr_t where) {
  OccupancyPack op;
  op.grid = pointer<const float>(grid);
  op.threshold = pointer<const float>(threshold);
  op.bits = pointer<uint8_t>(bits);
  op.n_cells = n_cells;
  check("occupancy_pack", backend::occupancy_pack(op, launch_at(where)));
}

inline void bind_occupancy(py::module_& module) {
  module.def("occupancy_update", &occupancy_update, py::call_guard<py::gil_scoped_release>());
  module.def("occupancy_pack", &occupancy_pack, py::call_guard<py::gil_scoped_release>());
}

}  // namespace bindings
}  // namespace dff
