// A warp as the group of lanes that works on one ray.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dff {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

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

}  // namespace cuda
}  // namespace dff
