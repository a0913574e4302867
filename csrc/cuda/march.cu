#include "dreamfusion_fast/march.h"
#include "dreamfusion_fast/march_tile.h"
#include "parallel.cuh"
#include "warp.cuh"

namespace dff {
namespace cuda {

namespace {

constexpr int kTileThreads = 128;
constexpr int64_t kTileBlocks = 2048;  // enough for any GPU; more rays are taken in turn

// A tile has few rays with many samples each, so a warp takes a ray, and looks at 32 samples at a time. Crossing empty
// space that way is no longer than what the rays of one tile have of it.
template <typename T, bool kWide>
__global__ void __launch_bounds__(kTileThreads) tile_kernel(const MarchTile<T> op) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t n_warps = static_cast<int64_t>(gridDim.x) * (kTileThreads / kWarp);
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kTileThreads + threadIdx.x) / kWarp;
  for (int64_t ray = op.ray_range[0] + warp; ray < op.ray_range[1]; ray += n_warps) {
    int64_t place = op.start(ray);
    const int64_t stop = op.end(ray);
    if (place >= stop) continue;
    const RayMarcher<T, kWide> marcher(op.rays, ray);
    for (int32_t k = op.firsts[ray]; place < stop && k < op.rays.n_steps; k += kWarp) {
      T distance;
      const bool kept = marcher.keeps(k + lane, &distance);
      const unsigned mask = __ballot_sync(kAllLanes, kept);
      const int64_t mine = place + __popc(mask & ((1u << lane) - 1u));
      if (kept && mine >= 0 && mine < stop) op.write(marcher, ray, mine, k + lane, distance);
      place += __popc(mask);
    }
  }
}

// Few rays leave most of a GPU without work, and each takes as long as its hundreds of samples one after the other.
constexpr int64_t kFewRays = 1 << 15;

// Then a warp takes a ray, and looks at 32 samples at a time; without skipping:
// sixteen rounds are all of a box that is 512 steps long.
template <typename T, bool kWide>
__global__ void __launch_bounds__(kTileThreads) count_kernel(const MarchCount<T> op) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t ray = (static_cast<int64_t>(blockIdx.x) * kTileThreads + threadIdx.x) / kWarp;
  if (ray >= op.rays.n_rays) return;
  const RayMarcher<T, kWide> marcher(op.rays, ray);
  int32_t count = 0;
  int32_t first = 0;
  for (int32_t k = 0; k < op.rays.n_steps; k += kWarp) {
    T distance;
    const unsigned mask = __ballot_sync(kAllLanes, marcher.keeps(k + lane, &distance));
    if (count == 0 && mask != 0) first = k + __ffs(mask) - 1;
    count += __popc(mask);
    if (__all_sync(kAllLanes, marcher.passed(k + lane))) break;
  }
  if (lane == 0) {
    op.counts[ray] = count;
    op.firsts[ray] = first;
  }
}

template <typename T>
__global__ void __launch_bounds__(kTileThreads) totals_kernel(const MarchTotals<T> op) {
  unsigned long long samples = 0, invalid = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kTileThreads;
  for (int64_t ray = static_cast<int64_t>(blockIdx.x) * kTileThreads + threadIdx.x; ray < op.n_rays; ray += stride) {
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

}  // namespace

Status march_blocks(const MarchBlocks& op, const Launch& launch) {
  const int64_t n = blocks_along(op.resolution);
  return for_each(op.cascades * n * n * n, launch, op);
}

template <typename Op>
Status march_each(const Op& op, const Launch& launch) {
  const int64_t n = op.rays.n_rays;
  return op.rays.wide() ? for_each(n, launch, MarchEach<Op, true>{op}) : for_each(n, launch, MarchEach<Op, false>{op});
}

template <typename T>
Status march_count(const MarchCount<T>& op, const Launch& launch) {
  const int64_t n = op.rays.n_rays;
  if (n <= 0 || n > kFewRays) return march_each(op, launch);
  const auto kernel = op.rays.wide() ? &count_kernel<T, true> : &count_kernel<T, false>;
  const int64_t blocks = (n + kTileThreads / kWarp - 1) / (kTileThreads / kWarp);
  kernel<<<static_cast<unsigned>(blocks), kTileThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(op);
  return launch_status();
}

template <typename T>
Status march_write(const MarchWrite<T>& op, const Launch& launch) {
  return march_each(op, launch);
}

template <typename T>
Status march_tile(const MarchTile<T>& op, const Launch& launch) {
  constexpr int64_t kRays = kTileThreads / kWarp;
  const int64_t blocks = std::min((std::min(op.rays.n_rays, op.capacity) + kRays - 1) / kRays, kTileBlocks);
  if (blocks <= 0) return nullptr;
  const auto kernel = op.rays.wide() ? &tile_kernel<T, true> : &tile_kernel<T, false>;
  kernel<<<static_cast<unsigned>(blocks), kTileThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(op);
  return launch_status();
}

template <typename T>
Status march_totals(const MarchTotals<T>& op, const Launch& launch) {
  const int64_t blocks = std::min<int64_t>((op.n_rays + kTileThreads - 1) / kTileThreads, 256);
  if (blocks <= 0) return nullptr;
  totals_kernel<<<static_cast<unsigned>(blocks), kTileThreads, 0, static_cast<cudaStream_t>(launch.stream)>>>(op);
  return launch_status();
}

template Status march_totals(const MarchTotals<float>&, const Launch&);
template Status march_totals(const MarchTotals<double>&, const Launch&);

Status tile_table(const TileTable& op, int64_t n_tiles, const Launch& launch) { return for_each(n_tiles, launch, op); }

template Status march_count(const MarchCount<float>&, const Launch&);
template Status march_count(const MarchCount<double>&, const Launch&);
template Status march_write(const MarchWrite<float>&, const Launch&);
template Status march_write(const MarchWrite<double>&, const Launch&);
template Status march_tile(const MarchTile<float>&, const Launch&);
template Status march_tile(const MarchTile<double>&, const Launch&);

}  // namespace cuda
}  // namespace dff
