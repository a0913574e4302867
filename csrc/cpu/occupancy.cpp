#include "dreamfusion_fast/occupancy.h"

#include "parallel.h"

namespace dff::cpu {

Status occupancy_update(const OccupancyUpdate& op, const Launch& launch) {
  for_each(op.n, launch, op, 1 << 14);
  if (op.cells == nullptr) return nullptr;
  for_each(op.n, launch, OccupancyClear{op}, op.n);
  // On one thread: cells may be listed twice, and a few hundred thousand of them take a millisecond.
  for (int64_t i = 0; i < op.n; ++i) {
    const int64_t cell = op.cells[i];
    if (cell >= 0 && cell < op.n_cells) op.grid[cell] = larger_known(op.decayed[i], op.grid[cell]);
  }
  return nullptr;
}

Status occupancy_pack(const OccupancyPack& op, const Launch& launch) {
  return for_each((op.n_cells + 7) / 8, launch, op, 1 << 12);
}

}  // namespace dff::cpu
