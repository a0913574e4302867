// What the kernels of the triplane share: which of them serves a launch, and a sample's scene.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "any_view.cuh"
#include "dreamfusion_fast/triplane_tile.h"
#include "parallel.cuh"

namespace dff::cuda {

// Successive features that a thread takes at once, 16 bytes of float32. One where they are no multiple of that; and of
// float64, which is there for tests.
template <typename Element>
constexpr int kWidest = std::is_same_v<Element, double> ? 1 : 4;

__device__ __forceinline__ int32_t scene_of(const Triplanes& shape, uint32_t sample) {
  return shape.scenes == nullptr ? 0 : __ldg(shape.scenes + sample);
}

inline Status tile_status(const TriplaneTile& tile) {
  const Triplanes& shape = tile.shape;
  if (shape.n_samples > kMaxTileSamples) return "a tile has at most 2^24 samples";
  if (shape.degree != 1 && shape.degree != 2) return "degree must be 1 or 2";
  if (std::min(shape.height, shape.width) < shape.degree + 1) return "a plane is smaller than one cell";
  if (std::max(shape.height, shape.width) > kMaxPlaneSide) return "a plane has at most 2^14 vertices a side";
  return nullptr;
}

// Calls start(std::integral_constant<int, degree>, std::integral_constant<int, features at once>) for planes, or their
// gradients, of this element; it launches a kernel.
template <typename Element, typename Start>
void with_shape(const Triplanes& shape, const Start& start) {
  const auto with_width = [&](auto degree) {
    if constexpr (kWidest<Element> > 1) {
      if (shape.n_features % kWidest<Element> == 0) {
        return start(degree, std::integral_constant<int, kWidest<Element>>());
      }
    }
    return start(degree, std::integral_constant<int, 1>());
  };
  shape.degree == 1 ? with_width(std::integral_constant<int, 1>()) : with_width(std::integral_constant<int, 2>());
}

}  // namespace dff::cuda
