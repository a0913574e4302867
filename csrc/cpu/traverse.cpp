#include "dreamfusion_fast/traverse.h"

#include "parallel.h"

namespace dff::cpu {

constexpr int64_t kRaysPerPiece = 32;  // a few microseconds each

Status traverse_blocks(const TraverseBlocks& op, const Launch& launch) { return for_each(op.count(), launch, op, 64); }

template <typename T>
Status traverse_count(const TraverseCount<T>& op, const Launch& launch) {
  return for_each(op.rays.n_rays, launch, op, kRaysPerPiece);
}

template <typename T>
Status traverse_write(const TraverseWrite<T>& op, const Launch& launch) {
  return for_each(op.rays.n_rays, launch, op, kRaysPerPiece);
}

DFF_FOR_FLOATS(traverse_count, TraverseCount);
DFF_FOR_FLOATS(traverse_write, TraverseWrite);

}  // namespace dff::cpu
