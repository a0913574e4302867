#include "dreamfusion_fast/ray_sums.h"
#include "warp.cuh"

namespace dff::cuda {

namespace {

template <typename T>
__global__ void __launch_bounds__(kWarpThreads) forward_kernel(const RaySumsForward<T> op) {
  for_each_by_warps(op.tile.ray_range, [&](int64_t ray) { ray_sums_forward_ray(op, ray, Warp()); });
}

template <typename T>
__global__ void __launch_bounds__(kWarpThreads) backward_kernel(const RaySumsBackward<T> op) {
  for_each_by_warps(op.tile.ray_range, [&](int64_t ray) { ray_sums_backward_ray(op, ray, Warp()); });
}

template <typename T>
__global__ void __launch_bounds__(kWarpThreads) visible_kernel(const RaySumsVisible<T> op) {
  for_each_by_warps(op.tile.ray_range, [&](int64_t ray) { ray_sums_visible_ray(op, ray, Warp()); });
}

template <typename Op>
Status launch_rays(void (*kernel)(const Op), const Op& op, const Launch& launch) {
  return launch_warps(kernel, std::min(op.tile.n_rays, op.tile.capacity), op, launch, kWarpBlocks);
}

}  // namespace

template <typename T>
Status ray_sums_forward(const RaySumsForward<T>& op, const Launch& launch) {
  return launch_rays(&forward_kernel<T>, op, launch);
}

template <typename T>
Status ray_sums_backward(const RaySumsBackward<T>& op, const Launch& launch) {
  return launch_rays(&backward_kernel<T>, op, launch);
}

template <typename T>
Status ray_sums_visible(const RaySumsVisible<T>& op, const Launch& launch) {
  return launch_rays(&visible_kernel<T>, op, launch);
}

DFF_FOR_FLOATS(ray_sums_forward, RaySumsForward);
DFF_FOR_FLOATS(ray_sums_backward, RaySumsBackward);
DFF_FOR_FLOATS(ray_sums_visible, RaySumsVisible);

}  // namespace dff::cuda
