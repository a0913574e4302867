#include "dreamfusion_fast/ray_box.h"
#include "parallel.cuh"

namespace dff {
namespace cuda {

template <typename T>
Status ray_box(const RayBox<T>& op, const Launch& launch) {
  return for_each(op.n_rays, launch, op);
}

template Status ray_box(const RayBox<float>&, const Launch&);
template Status ray_box(const RayBox<double>&, const Launch&);

}  // namespace cuda
}  // namespace dff
