// A warp as the group of lanes that works on one ray.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "parallel.cuh"

namespace dff::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpThreads = 128;      // of a block of launch_warps
constexpr int64_t kWarpBlocks = 2048;  // enough for any GPU; what needs more warps is taken in turn

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

  template <typename Scalar>
  __device__ Scalar exclusive_affine(Scalar scale, Scalar shift, Scalar start, Scalar* end) const {
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const Scalar other_scale = __shfl_up_sync(kAllLanes, scale, distance);
      const Scalar other_shift = __shfl_up_sync(kAllLanes, shift, distance);
      if (lane() >= distance) {
        shift += scale * other_shift;
        scale *= other_scale;
      }
    }
    const Scalar value = scale * start + shift;
    *end = __shfl_sync(kAllLanes, value, kWarp - 1);
    const Scalar before = __shfl_up_sync(kAllLanes, value, 1);
    return lane() == 0 ? start : before;
  }

  __device__ void sync() const { __syncwarp(); }
};

// The number of this warp in the grid, of launch_warps.
__device__ __forceinline__ int64_t warp_index() {
  return (static_cast<int64_t>(blockIdx.x) * kWarpThreads + threadIdx.x) / kWarp;
}

// Calls function(i) for each i of [range[0], range[1]), which the device alone knows, on a whole warp.
template <typename Function>
__device__ __forceinline__ void for_each_by_warps(const int32_t* range, const Function& function) {
  const int64_t n_warps = static_cast<int64_t>(gridDim.x) * (kWarpThreads / kWarp);
  for (int64_t i = range[0] + warp_index(); i < range[1]; i += n_warps) function(i);
}

// Launches kernel(op) with n warps, or those of max_blocks blocks.
template <typename Op>
Status launch_warps(void (*kernel)(const Op), int64_t n, const Op& op, const Launch& launch,
                    int64_t max_blocks = INT32_MAX) {
  constexpr int64_t kWarps = kWarpThreads / kWarp;
  const int64_t blocks = std::min((std::max<int64_t>(n, 0) + kWarps - 1) / kWarps, max_blocks);
  return launch_kernel(kernel, static_cast<unsigned>(blocks), kWarpThreads, launch, op);
}

}  // namespace dff::cuda
