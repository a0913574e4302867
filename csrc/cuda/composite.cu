#include "dreamfusion_fast/composite.h"
#include "parallel.cuh"

namespace dff {
namespace cuda {

namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kThreads = 128;  // 4 rays per block

// One warp per ray: its samples lie next to each other in memory, so a chunk of 32 is read in whole cache lines, and a
// ray of hundreds of samples (64 x 64 rays through a full ball) does not leave most of the GPU waiting for one thread's
// loop.
struct Warp {
  static constexpr int kWidth = kWarp;

  __device__ int lane() const { return static_cast<int>(threadIdx.x) % kWarp; }

  // No inclusive - own: with an infinite optical depth that would be NaN.
  template <typename Scalar>
  __device__ Scalar exclusive_sum(Scalar value, Scalar* total) const {
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const Scalar other = __shfl_up_sync(kAllLanes, value, distance);
      if (lane() >= distance) value += other;
    }
    *total = __shfl_sync(kAllLanes, value, kWarp - 1);
    const Scalar before = __shfl_up_sync(kAllLanes, value, 1);
    return lane() == 0 ? Scalar(0) : before;
  }

  template <typename Scalar>
  __device__ Scalar sum(Scalar value) const {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
    return value;
  }

  __device__ void sync() const { __syncwarp(); }
};

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
