// The table's gradient from a tile, of first and second order at once: what writes to the table.
#include "any_view.cuh"
#include "dreamfusion_fast/hash_grid_tile.h"
#include "hash_grid_cell.cuh"

namespace dff::cuda {

namespace {

// One thread per run of successive samples and level. Samples lie along rays, so that in coarse levels successive ones
// share a cell: their contributions are summed in registers, and atomics are spent on a cell once. The level is
// blockIdx.y, so that the GPU works on one level at a time, whose gradients (4 MB at 2^19 rows of 2 float32) then stay
// in L2. Atomics need no answer, so that few threads suffice: registers are better spent.
constexpr int kThreads = 128;
// In coarse levels, the fewer cells there are, the more threads wait for each other at the same rows: runs are longer.
constexpr uint32_t kCoarseRuns = 4;
constexpr uint32_t kCoarseResolution = 64;

// Features that one thread takes, so that the sums of 8 corners stay in registers; blockIdx.z counts such groups.
template <typename Scalar, int kFeatures>
constexpr int kColumnsAtOnce = std::min(kFeatures, std::is_same_v<Scalar, float> ? 4 : 2);

// What successive samples in one cell add to its corners.
template <int kColumns, typename Scalar>
struct Run {
  HashGridAxis<Scalar> axes[3];  // of any of its samples: only the cell is looked at
  Scalar sums[kCorners][kColumns];
  bool empty = true;

  __device__ __forceinline__ bool has(const HashGridAxis<Scalar> (&others)[3]) const {
    return !empty && axes[0].cell == others[0].cell && axes[1].cell == others[1].cell && axes[2].cell == others[2].cell;
  }

  __device__ __forceinline__ void start(const HashGridAxis<Scalar> (&first)[3]) {
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) axes[axis] = first[axis];
#pragma unroll
    for (int i = 0; i < kCorners; ++i) {
#pragma unroll
      for (int f = 0; f < kColumns; ++f) sums[i][f] = Scalar(0);
    }
    empty = false;
  }

  __device__ __forceinline__ void add(const Scalar (&weights)[kCorners], const Scalar (&grad)[kColumns]) {
#pragma unroll
    for (int i = 0; i < kCorners; ++i) {
#pragma unroll
      for (int f = 0; f < kColumns; ++f) sums[i][f] += weights[i] * grad[f];
    }
  }

  template <int kFeatures, typename Level>
  __device__ __forceinline__ void flush(const Level& level, Scalar* grad_table, int column) const {
    if (empty) return;
    uint32_t rows[kCorners];
    cell_rows(level, axes, rows);
    atomic_add_corners<kFeatures>(grad_table, column, level, rows, sums);
  }
};

template <typename Scalar, int kFeatures, bool kPlaced>
__global__ void __launch_bounds__(kThreads) scatter_kernel(const HashGridTileScatter op, bool fours) {
  constexpr int kCount = kChunk<Scalar>, kColumns = kColumnsAtOnce<Scalar, kFeatures>;
  const int index = static_cast<int>(blockIdx.y);
  const Level<kPlaced> level = read_level<kPlaced>(op.tile.levels, index);
  if (level.rows == 0) return;
  const uint32_t n_samples = live_samples(op.tile.count, op.tile.levels.n_samples);
  const uint32_t run_length = op.samples_per_thread * (level.resolution < kCoarseResolution ? kCoarseRuns : 1);
  const uint32_t begin = (blockIdx.x * kThreads + threadIdx.x) * run_length;
  if (begin >= n_samples) return;
  const uint32_t end = min(begin + run_length, n_samples);
  const uint32_t capacity = static_cast<uint32_t>(op.tile.levels.n_samples);
  const int column = kColumns == kFeatures ? 0 : static_cast<int>(blockIdx.z) * kColumns;
  Scalar* grad_table = static_cast<Scalar*>(op.grad_table);
  const bool has_first = op.grad_features.data != nullptr, has_second = op.grad_derivative.data != nullptr;

  Run<kColumns, Scalar> run;
  for (uint32_t first = begin; first < end; first += kCount) {
    const bool wide = fours && first + kCount <= capacity;
    Scalar positions[3][kCount], directions[3][kCount] = {};
    Scalar grads[kColumns][kCount] = {}, second_grads[kColumns][kCount] = {};
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      load_chunk(of_scalar<Scalar>(op.tile.positions), wide, first, end, axis, positions[axis]);
      if (has_second) load_chunk(of_scalar<Scalar>(op.direction), wide, first, end, axis, directions[axis]);
    }
#pragma unroll
    for (int f = 0; f < kColumns; ++f) {
      const uint32_t channel = index * kFeatures + column + f;
      if (has_first) load_chunk(op.grad_features, wide, first, end, channel, grads[f]);
      if (has_second) load_chunk(op.grad_derivative, wide, first, end, channel, second_grads[f]);
    }
#pragma unroll 1
    for (int i = 0; i < kCount; ++i) {
      if (first + i >= end) break;
      Scalar position[3], direction[3], grad[kColumns], second_grad[kColumns];
      take(positions, position);
      take(directions, direction);
      take(grads, grad);
      take(second_grads, second_grad);
      const bool second = any(second_grad) && any(direction);
      if (!second && !any(grad)) continue;  // an empty sample beyond a surface, say: it costs no atomics
      HashGridAxis<Scalar> axes[3];
      cell_axes(level, op.tile.levels.smoothstep, position, axes);
      if (!run.has(axes)) {
        run.template flush<kFeatures>(level, grad_table, column);
        run.start(axes);
      }
      Scalar weights[kCorners];
      hash_grid_weights(axes, weights);
      run.add(weights, grad);
      if (second) {
        hash_grid_weight_derivatives(axes, direction, weights);
        run.add(weights, second_grad);
      }
    }
  }
  run.template flush<kFeatures>(level, grad_table, column);
}

}  // namespace

Status hash_grid_tile_scatter(const HashGridTileScatter& op, const Launch& launch) {
  const HashGridLevels& levels = op.tile.levels;
  if (levels.n_samples > kMaxTileSamples) return "a tile has at most 2^24 samples";
  if (op.samples_per_thread < 4 || op.samples_per_thread % 4 != 0) {
    return "samples per thread must be a multiple of 4";
  }
  if (levels.n_samples <= 0) return nullptr;
  const int64_t per_block = int64_t(kThreads) * op.samples_per_thread;
  const auto blocks = [&](int groups) {
    return dim3(static_cast<unsigned>((levels.n_samples + per_block - 1) / per_block),
                static_cast<unsigned>(levels.n_levels), static_cast<unsigned>(groups));
  };
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  const bool fours = has_fours(op.tile.positions) && has_fours(op.direction) && has_fours(op.grad_features) &&
                     has_fours(op.grad_derivative);
  const auto start = [&](auto scalar, auto features, auto placed) {
    using Scalar = decltype(scalar);
    constexpr int kFeatures = decltype(features)::value;
    scatter_kernel<Scalar, kFeatures, decltype(placed)::value>
        <<<blocks(kFeatures / kColumnsAtOnce<Scalar, kFeatures>), kThreads, 0, stream>>>(op, fours);
  };
  return with_features(levels.n_features, [&](auto features) {
    const auto of_scalar = [&](auto scalar) {
      levels.placements != nullptr ? start(scalar, features, std::true_type())
                                   : start(scalar, features, std::false_type());
    };
    op.tile.positions.type == ElementType::kFloat64 ? of_scalar(double()) : of_scalar(float());
  });
}

}  // namespace dff::cuda
