#include "dreamfusion_fast/occupancy.h"
#include "parallel.cuh"

namespace dff {
namespace cuda {
namespace {

// The bits of floats without a sign are ordered as signed integers are, those with one as unsigned integers the other
// way round. So the integer maximum of the one and minimum of the other is the float maximum, whatever stands there.
__device__ __forceinline__ void atomic_max(float* target, float value) {
  if (__float_as_int(value) >= 0) {
    atomicMax(reinterpret_cast<int*>(target), __float_as_int(value));
  } else {
    atomicMin(reinterpret_cast<unsigned*>(target), __float_as_uint(value));
  }
}

struct OccupancyMerge {
  float* grid;
  OccupancyDecay decay;

  __device__ void operator()(int64_t i) const {
    const int64_t cell = decay.cells[i];
    if (cell >= 0 && cell < decay.n_cells) atomic_max(&grid[cell], decay.decayed[i]);
  }
};

}  // namespace

Status occupancy_update(float* grid, const OccupancyDecay& decay, const Launch& launch) {
  Status status = for_each(decay.n, launch, decay);
  if (status != nullptr || decay.cells == nullptr) return status;
  status = for_each(decay.n, launch, OccupancyClear{grid, decay.cells, decay.n_cells});
  if (status != nullptr) return status;
  return for_each(decay.n, launch, OccupancyMerge{grid, decay});
}

Status occupancy_pack(const OccupancyPack& op, const Launch& launch) {
  return for_each((op.n_cells + 7) / 8, launch, op);
}

}  // namespace cuda
}  // namespace dff
