#include "dreamfusion_fast/composite.h"
#include "warp.cuh"

namespace dff::cuda {

namespace {

template <Absorption kAbsorption, bool kOnlyWeights, typename Scalar>
__global__ void __launch_bounds__(kWarpThreads) forward_kernel(const CompositeForward<Scalar> op) {
  const int64_t ray = warp_index();
  if (ray < op.n_rays) composite_forward_ray<kAbsorption, kOnlyWeights>(op, ray, Warp());
}

template <Absorption kAbsorption, bool kOnlyWeights, typename Scalar>
__global__ void __launch_bounds__(kWarpThreads) backward_kernel(const CompositeBackward<Scalar> op) {
  const int64_t ray = warp_index();
  if (ray < op.n_rays) composite_backward_ray<kAbsorption, kOnlyWeights>(op, ray, Warp());
}

}  // namespace

template <typename Scalar>
Status composite_forward(const CompositeForward<Scalar>& op, const Launch& launch) {
  return composite_as_asked(op, [&](auto absorption, auto only_weights) {
    const auto kernel = &forward_kernel<decltype(absorption)::value, decltype(only_weights)::value, Scalar>;
    return launch_warps(kernel, op.n_rays, op, launch);
  });
}

template <typename Scalar>
Status composite_backward(const CompositeBackward<Scalar>& op, const Launch& launch) {
  return composite_as_asked(op, [&](auto absorption, auto only_weights) {
    const auto kernel = &backward_kernel<decltype(absorption)::value, decltype(only_weights)::value, Scalar>;
    return launch_warps(kernel, op.n_rays, op, launch);
  });
}

DFF_FOR_FLOATS(composite_forward, CompositeForward);
DFF_FOR_FLOATS(composite_backward, CompositeBackward);

}  // namespace dff::cuda
