#include "dreamfusion_fast/march_morton.h"

#include "parallel.h"

namespace dff::cpu {

constexpr int64_t kRaysPerPiece = 32;  // a few microseconds each

template <typename T>
Status morton_count(const MortonCount<T>& op, const Launch& launch) {
  return for_each(op.rays.n_rays, launch, op, kRaysPerPiece);
}

template <typename T>
Status morton_write(const MortonWrite<T>& op, const Launch& launch) {
  return for_each(op.rays.n_rays, launch, op, kRaysPerPiece);
}

DFF_FOR_FLOATS(morton_count, MortonCount);
DFF_FOR_FLOATS(morton_write, MortonWrite);

}  // namespace dff::cpu
