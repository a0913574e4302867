#include "dreamfusion_fast/composite.h"
#include "parallel.cuh"
#include "warp.cuh"

namespace dff {
namespace cuda {

namespace {

constexpr int kThreads = 128;  // 4 rays per block

__device__ int64_t ray_of_warp() { return (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp; }

template <bool kLengths, typename Scalar>
__global__ void __launch_bounds__(kThreads) forward_kernel(const CompositeForward<Scalar> op) {
  const int64_t ray = ray_of_warp();
  if (ray < op.n_rays) composite_forward_ray<kLengths>(op, ray, Warp());
}

template <bool kLengths, typename Scalar>
__global__ void __launch_bounds__(kThreads) backward_kernel(const CompositeBackward<Scalar> op) {
  const int64_t ray = ray_of_warp();
  if (ray < op.n_rays) composite_backward_ray<kLengths>(op, ray, Warp());
}

unsigned blocks(int64_t n_rays) {
  constexpr int64_t kRaysPerBlock = kThreads / kWarp;
  return static_cast<unsigned>((n_rays + kRaysPerBlock - 1) / kRaysPerBlock);
}

}  // namespace

template <typename Scalar>
Status composite_forward(const CompositeForward<Scalar>& op, const Launch& launch) {
  if (op.n_rays <= 0) return nullptr;
  const auto kernel = op.lengths != nullptr ? forward_kernel<true, Scalar> : forward_kernel<false, Scalar>;
  kernel<<<blocks(op.n_rays), kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(op);
  return launch_status();
}

template <typename Scalar>
Status composite_backward(const CompositeBackward<Scalar>& op, const Launch& launch) {
  if (op.n_rays <= 0) return nullptr;
  const auto kernel = op.lengths != nullptr ? backward_kernel<true, Scalar> : backward_kernel<false, Scalar>;
  kernel<<<blocks(op.n_rays), kThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(op);
  return launch_status();
}

template Status composite_forward(const CompositeForward<float>&, const Launch&);
template Status composite_forward(const CompositeForward<double>&, const Launch&);
template Status composite_backward(const CompositeBackward<float>&, const Launch&);
template Status composite_backward(const CompositeBackward<double>&, const Launch&);

}  // namespace cuda
}  // namespace dff
