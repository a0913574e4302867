#include "dreamfusion_fast/composite.h"
#include "warp.cuh"

namespace dff::cuda {

namespace {

template <bool kLengths, typename Scalar>
__global__ void __launch_bounds__(kWarpThreads) forward_kernel(const CompositeForward<Scalar> op) {
  const int64_t ray = warp_index();
  if (ray < op.n_rays) composite_forward_ray<kLengths>(op, ray, Warp());
}

template <bool kLengths, typename Scalar>
__global__ void __launch_bounds__(kWarpThreads) backward_kernel(const CompositeBackward<Scalar> op) {
  const int64_t ray = warp_index();
  if (ray < op.n_rays) composite_backward_ray<kLengths>(op, ray, Warp());
}

}  // namespace

template <typename Scalar>
Status composite_forward(const CompositeForward<Scalar>& op, const Launch& launch) {
  const auto kernel = op.lengths != nullptr ? &forward_kernel<true, Scalar> : &forward_kernel<false, Scalar>;
  return launch_warps(kernel, op.n_rays, op, launch);
}

template <typename Scalar>
Status composite_backward(const CompositeBackward<Scalar>& op, const Launch& launch) {
  const auto kernel = op.lengths != nullptr ? &backward_kernel<true, Scalar> : &backward_kernel<false, Scalar>;
  return launch_warps(kernel, op.n_rays, op, launch);
}

DFF_FOR_FLOATS(composite_forward, CompositeForward);
DFF_FOR_FLOATS(composite_backward, CompositeBackward);

}  // namespace dff::cuda
