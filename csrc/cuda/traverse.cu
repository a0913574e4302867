#include "dreamfusion_fast/traverse.h"
#include "parallel.cuh"

namespace dff::cuda {

Status traverse_blocks(const TraverseBlocks& op, const Launch& launch) { return for_each(op.count(), launch, op); }

template <typename T>
Status traverse_count(const TraverseCount<T>& op, const Launch& launch) {
  return for_each(op.rays.n_rays, launch, op);
}

template <typename T>
Status traverse_write(const TraverseWrite<T>& op, const Launch& launch) {
  return for_each(op.rays.n_rays, launch, op);
}

DFF_FOR_FLOATS(traverse_count, TraverseCount);
DFF_FOR_FLOATS(traverse_write, TraverseWrite);

}  // namespace dff::cuda
