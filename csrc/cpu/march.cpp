#include <algorithm>
#include <cmath>
#include <type_traits>

#include "dreamfusion_fast/march_tile.h"
#include "parallel.h"

namespace dff::cpu {

constexpr int64_t kRaysPerPiece = 32;  // a few microseconds each

Status march_blocks(const MarchBlocks& op, const Launch& launch) {
  const int64_t n = blocks_along(op.resolution);
  return for_each(op.cascades * n * n * n, launch, op, 64);
}

// Shrinks the box of cells that rays are followed through to the blocks that are occupied: most rays of a picture miss
// the object, and now end at once.
template <typename T>
void shrink(MarchRays<T>& rays) {
  if (rays.bitfield == nullptr) return;
  const int32_t n = blocks_along(rays.resolution);
  const double half = 0.5 * rays.resolution;
  for (int axis = 0; axis < 3; ++axis) {
    rays.low[axis] = rays.resolution;
    rays.high[axis] = 0;
  }
  for (int32_t cascade = 0; cascade < rays.cascades; ++cascade) {
    int32_t low[3] = {n, n, n};
    int32_t high[3] = {0, 0, 0};
    for (int32_t block = 0; block < n * n * n; ++block) {
      if (!rays.blocks[cascade * n * n * n + block]) continue;
      const int32_t index[3] = {block / (n * n), block / n % n, block % n};
      for (int axis = 0; axis < 3; ++axis) {
        low[axis] = std::min(low[axis], index[axis]);
        high[axis] = std::max(high[axis], index[axis] + 1);
      }
    }
    if (low[0] >= high[0]) continue;  // nothing is occupied
    // In cells of the last cascade, and for the others one more on each side, as positions are rounded.
    const double shrinks = 1.0 / (1 << (rays.cascades - 1 - cascade));
    const int32_t margin = cascade < rays.cascades - 1 ? 1 : 0;
    for (int axis = 0; axis < 3; ++axis) {
      const int32_t first = static_cast<int32_t>(std::floor((low[axis] * kBlock - half) * shrinks + half)) - margin;
      const int32_t end = static_cast<int32_t>(std::ceil((high[axis] * kBlock - half) * shrinks + half)) + margin;
      rays.low[axis] = std::min(rays.low[axis], std::max(first, 0));
      rays.high[axis] = std::max(rays.high[axis], std::min(end, rays.resolution));
    }
  }
}

// The op on rays [first, end).
template <typename Op>
Status march_each(Op op, int64_t first, int64_t end, const Launch& launch) {
  shrink(op.rays);
  const auto run = [&](auto wide) {
    const auto march = [&](int64_t i) { op.template march<decltype(wide)::value>(first + i); };
    return for_each(end - first, launch, march, kRaysPerPiece);
  };
  return op.rays.wide() ? run(std::true_type()) : run(std::false_type());
}

template <typename T>
Status march_count(const MarchCount<T>& op, const Launch& launch) {
  return march_each(op, 0, op.rays.n_rays, launch);
}

template <typename T>
Status march_write(const MarchWrite<T>& op, const Launch& launch) {
  return march_each(op, 0, op.rays.n_rays, launch);
}

template <typename T>
Status march_tile(const MarchTile<T>& op, const Launch& launch) {
  return march_each(op, op.ray_range[0], op.ray_range[1], launch);
}

template <typename T>
Status march_totals(const MarchTotals<T>& op, const Launch&) {
  for (int64_t ray = 0; ray < op.n_rays; ++ray) {
    op.totals[0] += op.counts[ray];
    op.totals[1] += op.invalid(ray);
  }
  return nullptr;
}

Status tile_table(const TileTable& op, const Launch& launch) { return for_each(op.n_tiles, launch, op, kRaysPerPiece); }

DFF_FOR_FLOATS(march_count, MarchCount);
DFF_FOR_FLOATS(march_write, MarchWrite);
DFF_FOR_FLOATS(march_tile, MarchTile);
DFF_FOR_FLOATS(march_totals, MarchTotals);

}  // namespace dff::cpu
