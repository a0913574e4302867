#include "dreamfusion_fast/stream.h"
#include "parallel.cuh"
#include "warp.cuh"

namespace dff {
namespace cuda {

namespace {

constexpr int kThreads = 128;      // 4 rays per block
constexpr int64_t kBlocks = 2048;  // enough for any GPU; more rays are taken in turn

// One warp per ray, as in composite.cu. Which rays lie in the tile is known on the device only.
template <typename T, typename Function>
__device__ void for_each_ray(const StreamTile<T>& tile, const Function& function) {
  const int64_t n_warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  for (int64_t ray = tile.ray_range[0] + warp; ray < tile.ray_range[1]; ray += n_warps) function(ray);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) forward_kernel(const StreamForward<T> op) {
  for_each_ray(op.tile, [&](int64_t ray) { stream_forward_ray(op, ray, Warp()); });
}

template <typename T>
__global__ void __launch_bounds__(kThreads) backward_kernel(const StreamBackward<T> op) {
  for_each_ray(op.tile, [&](int64_t ray) { stream_backward_ray(op, ray, Warp()); });
}

template <typename T>
__global__ void __launch_bounds__(kThreads) visible_kernel(const StreamVisible<T> op) {
  for_each_ray(op.tile, [&](int64_t ray) { stream_visible_ray(op, ray, Warp()); });
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
Status stream_forward(const StreamForward<T>& op, const Launch& launch) {
  return launch_rays(&forward_kernel<T>, op, launch);
}

template <typename T>
Status stream_backward(const StreamBackward<T>& op, const Launch& launch) {
  return launch_rays(&backward_kernel<T>, op, launch);
}

template <typename T>
Status stream_visible(const StreamVisible<T>& op, const Launch& launch) {
  return launch_rays(&visible_kernel<T>, op, launch);
}

template Status stream_forward(const StreamForward<float>&, const Launch&);
template Status stream_forward(const StreamForward<double>&, const Launch&);
template Status stream_backward(const StreamBackward<float>&, const Launch&);
template Status stream_backward(const StreamBackward<double>&, const Launch&);
template Status stream_visible(const StreamVisible<float>&, const Launch&);
template Status stream_visible(const StreamVisible<double>&, const Launch&);

}  // namespace cuda
}  // namespace dff
