#include "dreamfusion_fast/march.h"

#include <algorithm>
#include <cmath>

#include "dreamfusion_fast/march_tile.h"
#include "parallel.h"

namespace dff {
namespace cpu {

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
      const int32_t place[3] = {block / (n * n), block / n % n, block % n};
      for (int axis = 0; axis < 3; ++axis) {
        low[axis] = std::min(low[axis], place[axis]);
        high[axis] = std::max(high[axis], place[axis] + 1);
      }
    }
    if (low[0] >= high[0]) continue;  // nothing is occupied
    // In cells of the last cascade, and for the others one more on each side, as places are rounded.
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

template <typename Op>
Status march_each(Op op, const Launch& launch) {
  shrink(op.rays);
  const int64_t n = op.rays.n_rays;
  return op.rays.wide() ? for_each(n, launch, MarchEach<Op, true>{op}, kRaysPerPiece)
                        : for_each(n, launch, MarchEach<Op, false>{op}, kRaysPerPiece);
}

template <typename T>
Status march_count(const MarchCount<T>& op, const Launch& launch) {
  return march_each(op, launch);
}

template <typename T>
Status march_write(const MarchWrite<T>& op, const Launch& launch) {
  return march_each(op, launch);
}

template <typename T>
Status march_tile(const MarchTile<T>& op, const Launch& launch) {
  MarchTile<T> shrunk = op;
  shrink(shrunk.rays);
  const int64_t first = op.ray_range[0];
  const bool wide = op.rays.wide();
  return for_each(
      op.ray_range[1] - first, launch,
      [&](int64_t i) {
        if (wide) {
          shrunk.template march<true>(first + i);
        } else {
          shrunk.template march<false>(first + i);
        }
      },
      kRaysPerPiece);
}

template <typename T>
Status march_totals(const MarchTotals<T>& op, const Launch&) {
  for (int64_t ray = 0; ray < op.n_rays; ++ray) {
    op.totals[0] += op.counts[ray];
    op.totals[1] += op.invalid(ray);
  }
  return nullptr;
}

template Status march_totals(const MarchTotals<float>&, const Launch&);
template Status march_totals(const MarchTotals<double>&, const Launch&);

Status tile_table(const TileTable& op, int64_t n_tiles, const Launch& launch) {
  return for_each(n_tiles, launch, op, kRaysPerPiece);
}

template Status march_count(const MarchCount<float>&, const Launch&);
template Status march_count(const MarchCount<double>&, const Launch&);
template Status march_write(const MarchWrite<float>&, const Launch&);
template Status march_write(const MarchWrite<double>&, const Launch&);
template Status march_tile(const MarchTile<float>&, const Launch&);
template Status march_tile(const MarchTile<double>&, const Launch&);

}  // namespace cpu
}  // namespace dff
