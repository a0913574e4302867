#pragma once

#include <array>

#include "bindings/bind.h"
#include "bindings/view.h"
#include "dreamfusion_fast/march_tile.h"

namespace dff {
namespace bindings {

inline void march_blocks(Address bitfield, int32_t resolution, int32_t cascades, Address blocks, std::uintptr_t where) {
  MarchBlocks op;
  op.bitfield = pointer<const uint8_t>(bitfield);
  op.blocks = pointer<uint8_t>(blocks);
  op.resolution = resolution;
  op.cascades = cascades;
  check("march", backend::march_blocks(op, launch_at(where)));
}

template <typename T>
MarchRays<T> march_rays(Address origins, Address directions, Address t_near, Address t_far, Address aabb,
                        Address distances, int32_t n_steps, Address bitfield, Address blocks, int32_t resolution,
                        int32_t cascades, double step, bool jitter, uint64_t seed, Address seed_offset,
                        int64_t n_rays) {
  MarchRays<T> rays;
  rays.origins = pointer<const T>(origins);
  rays.directions = pointer<const T>(directions);
  rays.t_near = pointer<const T>(t_near);
  rays.t_far = pointer<const T>(t_far);
  rays.aabb = pointer<const T>(aabb);
  rays.distances = pointer<const T>(distances);
  rays.n_steps = distances != 0 ? n_steps : kMaxSteps;
  rays.bitfield = pointer<const uint8_t>(bitfield);
  rays.blocks = pointer<const uint8_t>(blocks);
  rays.step = static_cast<T>(step);
  rays.resolution = resolution;
  rays.cascades = cascades;
  for (int axis = 0; axis < 3; ++axis) {
    rays.low[axis] = 0;
    rays.high[axis] = resolution;
  }
  rays.jitter = jitter;
  rays.seed = seed;
  rays.seed_offset = pointer<const int64_t>(seed_offset);
  rays.n_rays = n_rays;
  return rays;
}

template <typename T>
void march_count(Address origins, Address directions, Address t_near, Address t_far, Address aabb, Address distances,
                 int32_t n_steps, Address bitfield, Address blocks, int32_t resolution, int32_t cascades, double step,
                 bool jitter, uint64_t seed, Address seed_offset, int64_t n_rays, Address counts, Address firsts,
                 std::uintptr_t where) {
  MarchCount<T> op;
  op.rays = march_rays<T>(origins, directions, t_near, t_far, aabb, distances, n_steps, bitfield, blocks, resolution,
                          cascades, step, jitter, seed, seed_offset, n_rays);
  op.counts = pointer<int32_t>(counts);
  op.firsts = pointer<int32_t>(firsts);
  check("march", backend::march_count(op, launch_at(where)));
}

template <typename T>
void march_write(Address origins, Address directions, Address t_near, Address t_far, Address aabb, Address distances,
                 int32_t n_steps, Address bitfield, Address blocks, int32_t resolution, int32_t cascades, double step,
                 bool jitter, uint64_t seed, Address seed_offset, int64_t n_rays, Address firsts, Address offsets,
                 Address t, Address lengths, Address ray_indices, int64_t capacity, std::uintptr_t where) {
  MarchWrite<T> op;
  op.rays = march_rays<T>(origins, directions, t_near, t_far, aabb, distances, n_steps, bitfield, blocks, resolution,
                          cascades, step, jitter, seed, seed_offset, n_rays);
  op.firsts = pointer<const int32_t>(firsts);
  op.offsets = pointer<const int32_t>(offsets);
  op.t = pointer<T>(t);
  op.lengths = pointer<T>(lengths);
  op.ray_indices = pointer<int32_t>(ray_indices);
  op.capacity = capacity;
  check("march", backend::march_write(op, launch_at(where)));
}

template <typename T>
void march_tile(Address origins, Address directions, Address t_near, Address t_far, Address aabb, Address distances,
                int32_t n_steps, Address bitfield, Address blocks, int32_t resolution, int32_t cascades, double step,
                bool jitter, uint64_t seed, Address seed_offset, int64_t n_rays, Address firsts, Address offsets,
                Address ray_range, Address t, Address lengths, const ViewArguments& positions,
                const std::array<double, 6>& box, int64_t first, int64_t capacity, std::uintptr_t where) {
  MarchTile<T> op;
  op.rays = march_rays<T>(origins, directions, t_near, t_far, aabb, distances, n_steps, bitfield, blocks, resolution,
                          cascades, step, jitter, seed, seed_offset, n_rays);
  op.firsts = pointer<const int32_t>(firsts);
  op.offsets = pointer<const int32_t>(offsets);
  op.ray_range = pointer<const int32_t>(ray_range);
  op.t = pointer<T>(t);
  op.lengths = pointer<T>(lengths);
  op.positions = view<T>(positions);
  for (int axis = 0; axis < 3; ++axis) {
    op.low[axis] = static_cast<T>(box[axis]);
    op.extent[axis] = static_cast<T>(box[axis + 3] - box[axis]);
  }
  op.first = first;
  op.capacity = capacity;
  check("march_tile", backend::march_tile(op, launch_at(where)));
}

template <typename T>
void march_totals(Address counts, Address origins, Address directions, double tolerance, Address totals, int64_t n_rays,
                  std::uintptr_t where) {
  MarchTotals<T> op;
  op.counts = pointer<const int32_t>(counts);
  op.origins = pointer<const T>(origins);
  op.directions = pointer<const T>(directions);
  op.tolerance = static_cast<T>(tolerance);
  op.totals = pointer<int64_t>(totals);
  op.n_rays = n_rays;
  check("march_totals", backend::march_totals(op, launch_at(where)));
}

inline void tile_table(Address offsets, Address table, int64_t n_rays, int64_t size, int64_t n_tiles,
                       std::uintptr_t where) {
  TileTable op;
  op.offsets = pointer<const int32_t>(offsets);
  op.table = pointer<int32_t>(table);
  op.n_rays = n_rays;
  op.size = size;
  check("tile_table", backend::tile_table(op, n_tiles, launch_at(where)));
}

inline void bind_march(py::module_& module) {
  module.def("march_blocks", &march_blocks, py::call_guard<py::gil_scoped_release>());
  DFF_DEF(module, "march_count", march_count);
  DFF_DEF(module, "march_write", march_write);
  DFF_DEF(module, "march_tile", march_tile);
  DFF_DEF(module, "march_totals", march_totals);
  module.def("tile_table", &tile_table, py::call_guard<py::gil_scoped_release>());
}

}  // namespace bindings
}  // namespace dff
