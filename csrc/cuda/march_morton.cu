#include "dreamfusion_fast/march_morton.h"
#include "parallel.cuh"

namespace dff::cuda {

template <typename T>
Status morton_count(const MortonCount<T>& op, const Launch& launch) {
  return for_each(op.rays.n_rays, launch, op);
}

template <typename T>
Status morton_write(const MortonWrite<T>& op, const Launch& launch) {
  return for_each(op.rays.n_rays, launch, op);
}

DFF_FOR_FLOATS(morton_count, MortonCount);
DFF_FOR_FLOATS(morton_write, MortonWrite);

}  // namespace dff::cuda
