#include "dreamfusion_fast/march.h"
#include "parallel.cuh"

namespace dff {
namespace cuda {

Status march_blocks(const MarchBlocks& op, const Launch& launch) {
  const int64_t n = blocks_along(op.resolution);
  return for_each(op.cascades * n * n * n, launch, op);
}

template <typename Op>
Status march_each(const Op& op, const Launch& launch) {
  const int64_t n = op.rays.n_rays;
  return op.rays.wide() ? for_each(n, launch, MarchEach<Op, true>{op}) : for_each(n, launch, MarchEach<Op, false>{op});
}

template <typename T>
Status march_count(const MarchCount<T>& op, const Launch& launch) {
  return march_each(op, launch);
}

template <typename T>
Status march_write(const MarchWrite<T>& op, const Launch& launch) {
  return march_each(op, launch);
}

template Status march_count(const MarchCount<float>&, const Launch&);
template Status march_count(const MarchCount<double>&, const Launch&);
template Status march_write(const MarchWrite<float>&, const Launch&);
template Status march_write(const MarchWrite<double>&, const Launch&);

}  // namespace cuda
}  // namespace dff
