#include "dreamfusion_fast/march.h"

#include "parallel.h"

namespace dff {
namespace cpu {

constexpr int64_t kRaysPerPiece = 32;  // a few microseconds each

Status march_blocks(const MarchBlocks& op, const Launch& launch) {
  const int64_t n = blocks_along(op.resolution);
  return for_each(n * n * n, launch, op, 64);
}

template <typename T>
Status march_count(const MarchCount<T>& op, const Launch& launch) {
  return for_each(op.rays.n_rays, launch, op, kRaysPerPiece);
}

template <typename T>
Status march_write(const MarchWrite<T>& op, const Launch& launch) {
  return for_each(op.rays.n_rays, launch, op, kRaysPerPiece);
}

template Status march_count(const MarchCount<float>&, const Launch&);
template Status march_count(const MarchCount<double>&, const Launch&);
template Status march_write(const MarchWrite<float>&, const Launch&);
template Status march_write(const MarchWrite<double>&, const Launch&);

}  // namespace cpu
}  // namespace dff
