#include "dreamfusion_fast/ray_box.h"
#include "parallel.cuh"

namespace dff::cuda {

template <typename T>
Status ray_box(const RayBox<T>& op, const Launch& launch) {
  return for_each(op.n_rays, launch, op);
}

DFF_FOR_FLOATS(ray_box, RayBox);

}  // namespace dff::cuda
