#include "dreamfusion_fast/occupancy.h"
#include "parallel.cuh"

namespace dff::cuda {
namespace {

// The bits of floats without a sign are ordered as signed integers are, those with one as unsigned integers the other
// way round. So the integer maximum of the one and minimum of the other is the float maximum, whatever number stands
// there, or the NaN of all bits, which every number replaces.
__device__ __forceinline__ void atomic_max(float* target, float value) {
  if (__float_as_int(value) >= 0) {
    atomicMax(reinterpret_cast<int*>(target), __float_as_int(value));
  } else {
    atomicMin(reinterpret_cast<unsigned*>(target), __float_as_uint(value));
  }
}

struct OccupancyMerge {
  OccupancyUpdate update;

  __device__ void operator()(int64_t i) const {
    const int64_t cell = update.cells[i];
    const float decayed = update.decayed[i];
    if (cell >= 0 && cell < update.n_cells && decayed == decayed) atomic_max(&update.grid[cell], decayed);
  }
};

}  // namespace

Status occupancy_update(const OccupancyUpdate& op, const Launch& launch) {
  Status status = for_each(op.n, launch, op);
  if (status != nullptr || op.cells == nullptr) return status;
  status = for_each(op.n, launch, OccupancyClear{op});
  return status != nullptr ? status : for_each(op.n, launch, OccupancyMerge{op});
}

Status occupancy_pack(const OccupancyPack& op, const Launch& launch) {
  return for_each((op.n_cells + 7) / 8, launch, op);
}

}  // namespace dff::cuda
