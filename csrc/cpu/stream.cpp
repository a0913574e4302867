#include "dreamfusion_fast/stream.h"

#include "parallel.h"

namespace dff {
namespace cpu {

namespace {

constexpr int64_t kRaysPerPiece = 16;  // some 500 samples

template <typename T, typename Function>
Status for_each_ray(const StreamTile<T>& tile, const Launch& launch, const Function& function) {
  const int64_t first = tile.ray_range[0];
  return for_each(tile.ray_range[1] - first, launch, [&](int64_t i) { function(first + i); }, kRaysPerPiece);
}

}  // namespace

template <typename T>
Status stream_forward(const StreamForward<T>& op, const Launch& launch) {
  return for_each_ray(op.tile, launch, [&](int64_t ray) { stream_forward_ray(op, ray, SingleLane()); });
}

template <typename T>
Status stream_backward(const StreamBackward<T>& op, const Launch& launch) {
  return for_each_ray(op.tile, launch, [&](int64_t ray) { stream_backward_ray(op, ray, SingleLane()); });
}

template <typename T>
Status stream_visible(const StreamVisible<T>& op, const Launch& launch) {
  return for_each_ray(op.tile, launch, [&](int64_t ray) { stream_visible_ray(op, ray, SingleLane()); });
}

template Status stream_forward(const StreamForward<float>&, const Launch&);
template Status stream_forward(const StreamForward<double>&, const Launch&);
template Status stream_backward(const StreamBackward<float>&, const Launch&);
template Status stream_backward(const StreamBackward<double>&, const Launch&);
template Status stream_visible(const StreamVisible<float>&, const Launch&);
template Status stream_visible(const StreamVisible<double>&, const Launch&);

}  // namespace cpu
}  // namespace dff
