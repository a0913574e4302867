#include "dreamfusion_fast/ray_sums.h"
#include "parallel.cuh"
#include "warp.cuh"

namespace dff {
namespace cuda {

namespace {

constexpr int kThreads = 128;      // 4 rays per block
constexpr int64_t kBlocks = 2048;  // enough for any GPU; more rays are taken in turn

// One warp per ray, as in composite.cu. Which rays lie in the tile is known on the device only.
template <typename T, typename Function>
__device__ void for_each_ray(const SampleTile<T>& tile, const Function& function) {
  const int64_t n_warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  for (int64_t ray = tile.ray_range[0] + warp; ray < tile.ray_range[1]; ray += n_warps) function(ray);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) forward_kernel(const RaySumsForward<T> op) {
  for_each_ray(op.tile, [&](int64_t ray) { ray_sums_forward_ray(op, ray, Warp()); });
}

template <typename T>
__global__ void __launch_bounds__(kThreads) backward_kernel(const RaySumsBackward<T> op) {
  for_each_ray(op.tile, [&](int64_t ray) { ray_sums_backward_ray(op, ray, Warp()); });
}

template <typename T>
__global__ void __launch_bounds__(kThreads) visible_kernel(const RaySumsVisible<T> op) {
  for_each_ray(op.tile, [&](int64_t ray) { ray_sums_visible_ray(op, ray, Warp()); });
}

template <typename Op>
Status launch_rays(void (*kernel)(const Op), const Op& op, const Launch& launch) {
  constexpr int64_t kRays = kThreads / kWarp;
  const int64_t rays = std::min(op.tile.n_rays, op.tile.capacity);
  const int64_t blocks = std::min((rays + kRays - 1) / kRays, kBlocks);
  if (blocks <= 0) return nullptr;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(op);
  return launch_status();
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

template Status ray_sums_forward(const RaySumsForward<float>&, const Launch&);
template Status ray_sums_forward(const RaySumsForward<double>&, const Launch&);
template Status ray_sums_backward(const RaySumsBackward<float>&, const Launch&);
template Status ray_sums_backward(const RaySumsBackward<double>&, const Launch&);
template Status ray_sums_visible(const RaySumsVisible<float>&, const Launch&);
template Status ray_sums_visible(const RaySumsVisible<double>&, const Launch&);

}  // namespace cuda
}  // namespace dff
