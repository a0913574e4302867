#include "dreamfusion_fast/march_tile.h"
#include "warp.cuh"

namespace dff::cuda {

namespace {

// A tile has few rays with many samples each, so a warp takes a ray, and looks at 32 samples at a time. Crossing empty
// space that way is no longer than what the rays of one tile have of it.
template <typename T, bool kWide>
__global__ void __launch_bounds__(kWarpThreads) tile_kernel(const MarchTile<T> op) {
  const int lane = Warp().lane();
  for_each_by_warps(op.ray_range, [&](int64_t ray) {
    int64_t slot = op.start(ray);
    const int64_t stop = op.end(ray);
    if (slot >= stop) return;
    const RayMarcher<T, kWide> marcher(op.rays, ray);
    const unsigned before = (1u << lane) - 1u;
    const uint8_t* wanted = op.kept == nullptr ? nullptr : op.kept + op.marched[ray];
    for (int32_t k = op.firsts[ray]; slot < stop && k < op.rays.n_steps; k += kWarp) {
      T distance;
      bool kept = marcher.keeps(k + lane, &distance);
      unsigned mask = __ballot_sync(kAllLanes, kept);
      if (wanted != nullptr) {
        const uint8_t* mine = wanted + __popc(mask & before);
        wanted += __popc(mask);
        kept = kept && *mine != 0;
        mask = __ballot_sync(kAllLanes, kept);
      }
      const int64_t mine = slot + __popc(mask & before);
      if (kept && mine >= 0 && mine < stop) op.write(marcher, ray, mine, k + lane, distance);
      slot += __popc(mask);
    }
  });
}

// Few rays leave most of a GPU without work, and each takes as long as its hundreds of samples one after the other.
constexpr int64_t kFewRays = 1 << 15;

// Then a warp takes a ray, and looks at 32 samples at a time; without skipping:
// sixteen rounds are all of a box that is 512 steps long.
template <typename T, bool kWide>
__global__ void __launch_bounds__(kWarpThreads) count_kernel(const MarchCount<T> op) {
  const int lane = Warp().lane();
  const int64_t ray = warp_index();
  if (ray >= op.rays.n_rays) return;
  const RayMarcher<T, kWide> marcher(op.rays, ray);
  const T left = marcher.left();
  int32_t count = 0;
  int32_t first = 0;
  for (int32_t k = 0; k < op.rays.n_steps; k += kWarp) {
    T distance;
    const unsigned mask = __ballot_sync(kAllLanes, marcher.keeps(k + lane, &distance));
    if (count == 0 && mask != 0) first = k + __ffs(mask) - 1;
    count += __popc(mask);
    if (__all_sync(kAllLanes, marcher.passed(k + lane, left))) break;
  }
  if (lane == 0) {
    op.counts[ray] = count;
    op.firsts[ray] = first;
  }
}

template <typename T>
__global__ void __launch_bounds__(kWarpThreads) totals_kernel(const MarchTotals<T> op) {
  unsigned long long samples = 0, invalid = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarpThreads;
  for (int64_t ray = static_cast<int64_t>(blockIdx.x) * kWarpThreads + threadIdx.x; ray < op.n_rays; ray += stride) {
    samples += op.counts[ray];
    invalid += op.invalid(ray);
  }
  samples = Warp().sum(samples);
  invalid = Warp().sum(invalid);
  if (threadIdx.x % kWarp != 0) return;
  unsigned long long* totals = reinterpret_cast<unsigned long long*>(op.totals);
  atomicAdd(totals, samples);
  if (invalid != 0) atomicAdd(totals + 1, invalid);
}

// An op on each ray, by one thread.
template <typename Op, bool kWide>
struct MarchEach {
  Op op;
  DFF_HD void operator()(int64_t ray) const { op.template march<kWide>(ray); }
};

template <typename Op>
Status march_each(const Op& op, const Launch& launch) {
  const int64_t n = op.rays.n_rays;
  return op.rays.wide() ? for_each(n, launch, MarchEach<Op, true>{op}) : for_each(n, launch, MarchEach<Op, false>{op});
}

}  // namespace

Status march_blocks(const MarchBlocks& op, const Launch& launch) {
  const int64_t n = blocks_along(op.resolution);
  return for_each(op.cascades * n * n * n, launch, op);
}

template <typename T>
Status march_count(const MarchCount<T>& op, const Launch& launch) {
  if (op.rays.n_rays > kFewRays) return march_each(op, launch);
  const auto kernel = op.rays.wide() ? &count_kernel<T, true> : &count_kernel<T, false>;
  return launch_warps(kernel, op.rays.n_rays, op, launch);
}

template <typename T>
Status march_write(const MarchWrite<T>& op, const Launch& launch) {
  return march_each(op, launch);
}

template <typename T>
Status march_tile(const MarchTile<T>& op, const Launch& launch) {
  const auto kernel = op.rays.wide() ? &tile_kernel<T, true> : &tile_kernel<T, false>;
  return launch_warps(kernel, std::min(op.rays.n_rays, op.capacity), op, launch, kWarpBlocks);
}

template <typename T>
Status march_totals(const MarchTotals<T>& op, const Launch& launch) {
  const int64_t blocks = std::min<int64_t>((op.n_rays + kWarpThreads - 1) / kWarpThreads, 256);
  return launch_kernel(&totals_kernel<T>, static_cast<unsigned>(blocks), kWarpThreads, launch, op);
}

Status tile_table(const TileTable& op, const Launch& launch) { return for_each(op.n_tiles, launch, op); }

DFF_FOR_FLOATS(march_count, MarchCount);
DFF_FOR_FLOATS(march_write, MarchWrite);
DFF_FOR_FLOATS(march_tile, MarchTile);
DFF_FOR_FLOATS(march_totals, MarchTotals);

}  // namespace dff::cuda
