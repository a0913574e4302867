#include "dreamfusion_fast/occupancy.h"

#include <algorithm>

#include "parallel.h"

namespace dff {
namespace cpu {

Status occupancy_update(float* grid, const OccupancyDecay& decay, const Launch& launch) {
  for_each(decay.n, launch, decay, 1 << 14);
  if (decay.cells == nullptr) return nullptr;
  for_each(decay.n, launch, OccupancyClear{grid, decay.cells, decay.n_cells}, decay.n);
  // On one thread: cells may be listed twice, and a few hundred thousand of them take a millisecond.
  for (int64_t i = 0; i < decay.n; ++i) {
    const int64_t cell = decay.cells[i];
    if (cell >= 0 && cell < decay.n_cells) grid[cell] = std::max(grid[cell], decay.decayed[i]);
  }
  return nullptr;
}

Status occupancy_pack(const OccupancyPack& op, const Launch& launch) {
  return for_each((op.n_cells + 7) / 8, launch, op, 1 << 12);
}

}  // namespace cpu
}  // namespace dff
