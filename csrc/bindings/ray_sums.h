#pragma once

#include <array>

#include "bindings/view.h"
#include "dreamfusion_fast/ray_sums.h"

namespace dff {
namespace bindings {

// centre and extent of the box, activation, blob_scale, blob_width, ball, shading, ambient, diffuse, light, its stride
using HeadArguments = std::tuple<std::array<double, 3>, std::array<double, 3>, int32_t, double, double, bool, int32_t,
                                 double, double, Address, int64_t>;

template <typename T>
SampleHead<T> sample_head(const HeadArguments& given) {
  SampleHead<T> head;
  for (int axis = 0; axis < 3; ++axis) {
    head.centre[axis] = static_cast<T>(std::get<0>(given)[axis]);
    head.extent[axis] = static_cast<T>(std::get<1>(given)[axis]);
  }
  head.activation = static_cast<DensityActivation>(std::get<2>(given));
  head.blob_scale = static_cast<T>(std::get<3>(given));
  head.blob_width = static_cast<T>(std::get<4>(given));
  head.ball = std::get<5>(given);
  head.shading = static_cast<SampleShading>(std::get<6>(given));
  head.ambient = static_cast<T>(std::get<7>(given));
  head.diffuse = static_cast<T>(std::get<8>(given));
  head.light = pointer<const T>(std::get<9>(given));
  head.light_stride = std::get<10>(given);
  return head;
}

// offsets, ray_range, directions, t, lengths, positions, logits, slopes, n_rays, first, capacity, step
using TileArguments = std::tuple<Address, Address, Address, Address, Address, ViewArguments, ViewArguments,
                                 ViewArguments, int64_t, int64_t, int64_t, double>;

template <typename T>
SampleTile<T> sample_tile(const TileArguments& given) {
  SampleTile<T> tile;
  tile.offsets = pointer<const int32_t>(std::get<0>(given));
  tile.ray_range = pointer<const int32_t>(std::get<1>(given));
  tile.directions = pointer<const T>(std::get<2>(given));
  tile.t = pointer<const T>(std::get<3>(given));
  tile.lengths = pointer<const T>(std::get<4>(given));
  tile.positions = view<const T>(std::get<5>(given));
  tile.logits = view<const T>(std::get<6>(given));
  tile.slopes = view<const T>(std::get<7>(given));
  tile.n_rays = std::get<8>(given);
  tile.first = std::get<9>(given);
  tile.capacity = std::get<10>(given);
  tile.step = static_cast<T>(std::get<11>(given));
  return tile;
}

template <typename T>
void ray_sums_forward(const HeadArguments& head, const TileArguments& tile, Address sums, Address prefix,
                      bool distortion, bool entropy, std::uintptr_t where) {
  RaySumsForward<T> op;
  op.head = sample_head<T>(head);
  op.tile = sample_tile<T>(tile);
  op.sums = pointer<T>(sums);
  op.prefix = pointer<T>(prefix);
  op.distortion = distortion;
  op.entropy = entropy;
  check("stream", backend::ray_sums_forward(op, launch_at(where)));
}

template <typename T>
void ray_sums_backward(const HeadArguments& head, const TileArguments& tile, Address sums, Address grad_sums,
                       Address prefix, Address suffix_after, Address suffix, const ViewArguments& grad_logits,
                       const ViewArguments& grad_slopes, bool distortion, bool entropy, std::uintptr_t where) {
  RaySumsBackward<T> op;
  op.head = sample_head<T>(head);
  op.tile = sample_tile<T>(tile);
  op.sums = pointer<const T>(sums);
  op.grad_sums = pointer<const T>(grad_sums);
  op.prefix = pointer<const T>(prefix);
  op.suffix_after = pointer<const T>(suffix_after);
  op.suffix = pointer<T>(suffix);
  op.grad_logits = view<T>(grad_logits);
  op.grad_slopes = view<T>(grad_slopes);
  op.distortion = distortion;
  op.entropy = entropy;
  check("stream", backend::ray_sums_backward(op, launch_at(where)));
}

template <typename T>
void ray_sums_visible(const HeadArguments& head, const TileArguments& tile, Address depths, Address counts,
                      double limit, std::uintptr_t where) {
  RaySumsVisible<T> op;
  op.head = sample_head<T>(head);
  op.tile = sample_tile<T>(tile);
  op.depths = pointer<T>(depths);
  op.counts = pointer<int32_t>(counts);
  op.limit = static_cast<T>(limit);
  check("stream", backend::ray_sums_visible(op, launch_at(where)));
}

inline void bind_ray_sums(py::module_& module) {
  DFF_DEF(module, "ray_sums_forward", ray_sums_forward);
  DFF_DEF(module, "ray_sums_backward", ray_sums_backward);
  DFF_DEF(module, "ray_sums_visible", ray_sums_visible);
}

}  // namespace bindings
}  // namespace dff
