#include "dreamfusion_fast/ray_sums.h"

#include "parallel.h"

namespace dff::cpu {

namespace {

constexpr int64_t kRaysPerPiece = 16;  // some 500 samples

template <typename T, typename Function>
Status for_each_ray(const SampleTile<T>& tile, const Launch& launch, const Function& function) {
  const int64_t first = tile.ray_range[0];
  return for_each(tile.ray_range[1] - first, launch, [&](int64_t i) { function(first + i); }, kRaysPerPiece);
}

}  // namespace

template <typename T>
Status ray_sums_forward(const RaySumsForward<T>& op, const Launch& launch) {
  return for_each_ray(op.tile, launch, [&](int64_t ray) { ray_sums_forward_ray(op, ray, SingleLane()); });
}

template <typename T>
Status ray_sums_backward(const RaySumsBackward<T>& op, const Launch& launch) {
  return for_each_ray(op.tile, launch, [&](int64_t ray) { ray_sums_backward_ray(op, ray, SingleLane()); });
}

template <typename T>
Status ray_sums_visible(const RaySumsVisible<T>& op, const Launch& launch) {
  return for_each_ray(op.tile, launch, [&](int64_t ray) { ray_sums_visible_ray(op, ray, SingleLane()); });
}

DFF_FOR_FLOATS(ray_sums_forward, RaySumsForward);
DFF_FOR_FLOATS(ray_sums_backward, RaySumsBackward);
DFF_FOR_FLOATS(ray_sums_visible, RaySumsVisible);

}  // namespace dff::cpu
