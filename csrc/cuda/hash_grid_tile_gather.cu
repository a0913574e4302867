// Encoding of a tile, its directional derivative, and its gradient by the positions: what reads the table.
#include <limits>

#include "any_view.cuh"
#include "dreamfusion_fast/hash_grid_tile.h"
#include "hash_grid_cell.cuh"

namespace dff::cuda {

namespace {

// One thread per sample and group of levels, which it goes through one by one: position and cell arithmetic stay in
// registers, and a group is as large as its table may be to stay in L2 (groups are blockIdx.y, so the GPU works on one
// at a time). Successive threads have successive samples, so that channel-major arrays are read and written in whole
// sectors.
constexpr int kThreads = 128;

template <typename Table>
using ScalarOf = std::conditional_t<std::is_same_v<Table, double>, double, float>;

// Blocks per multiprocessor that registers have to suffice for, with levels placed as ours are. Left alone, the
// compiler saves registers where it can by loading a pair of corners, using it, loading the next; with 64 to spend it
// asks for all corners of a level at once.
template <typename Table, int kFeatures, bool kPlaced>
constexpr int kBlocks = kFeatures <= 2 && !std::is_same_v<Table, double> && !kPlaced ? 8 : 1;

// The levels [begin, end), once per block.
template <bool kPlaced>
__device__ __forceinline__ void read_levels(const HashGridLevels& levels, int begin, int end,
                                            Level<kPlaced> (&read)[kMaxLevelsPerThread]) {
  const int mine = begin + static_cast<int>(threadIdx.x);
  if (mine < end) read[threadIdx.x] = read_level<kPlaced>(levels, mine);
  __syncthreads();
}

template <typename Table, int kFeatures, bool kDerivative, bool kPlaced>
__global__ void __launch_bounds__(kThreads, kBlocks<Table, kFeatures, kPlaced>)
    encode_kernel(const HashGridTileEncode op, bool row) {
  using Scalar = ScalarOf<Table>;
  __shared__ Level<kPlaced> levels[kMaxLevelsPerThread];
  const uint32_t n_samples = live_samples(op.tile.count, op.tile.levels.n_samples), first = blockIdx.x * kThreads,
                 sample = first + threadIdx.x;
  if (first >= n_samples) return;
  const int begin = static_cast<int>(blockIdx.y) * op.levels_per_thread;
  const int end = min(begin + op.levels_per_thread, op.tile.levels.n_levels);
  read_levels<kPlaced>(op.tile.levels, begin, end, levels);
  if (sample >= n_samples) return;

  Scalar position[3], direction[3];
  load_vector(op.tile.positions, sample, position);
  if (kDerivative) load_vector(op.direction, sample, direction);
  for (int index = begin; index < end; ++index) {
    const Level<kPlaced> level = levels[index - begin];
    Scalar output[kFeatures] = {};
    if (level.rows == 0) {  // loud, and without waiting: the host cannot check this where it would not synchronise
      for (int f = 0; f < kFeatures; ++f) output[f] = std::numeric_limits<Scalar>::quiet_NaN();
    } else {
      HashGridAxis<Scalar> axes[3];
      cell_axes(level, op.tile.levels.smoothstep, position, axes);
      uint32_t rows[kCorners];
      cell_rows(level, axes, rows);
      Row<Table, kFeatures> corners[kCorners];
      load_corners(static_cast<const Table*>(op.table), level, rows, corners);
      Scalar weights[kCorners];
      if constexpr (kDerivative) {
        hash_grid_weight_derivatives(axes, direction, weights);
      } else {
        hash_grid_weights(axes, weights);
      }
#pragma unroll
      for (int i = 0; i < kCorners; ++i) {
#pragma unroll
        for (int f = 0; f < kFeatures; ++f) output[f] += weights[i] * to_scalar(corners[i].values[f]);
      }
    }
    store_elements(op.output, row, sample, index * kFeatures, output);
  }
}

// Writes the sum over the levels [begin, end), or adds it to what is there.
template <typename Table, int kFeatures, bool kDerivative, bool kPlaced>
__global__ void __launch_bounds__(kThreads, kBlocks<Table, kFeatures, kPlaced>)
    position_gradient_kernel(const HashGridTilePositionGradient op, bool row, int begin, int end, bool add) {
  using Scalar = ScalarOf<Table>;
  __shared__ Level<kPlaced> levels[kMaxLevelsPerThread];
  const uint32_t n_samples = live_samples(op.tile.count, op.tile.levels.n_samples), first = blockIdx.x * kThreads,
                 sample = first + threadIdx.x;
  if (first >= n_samples) return;
  read_levels<kPlaced>(op.tile.levels, begin, end, levels);
  if (sample >= n_samples) return;

  Scalar position[3], direction[3], sum[3] = {};
  load_vector(op.tile.positions, sample, position);
  if (kDerivative) load_vector(op.direction, sample, direction);
  if (add) load_vector(op.gradient, sample, sum);
  for (int index = begin; index < end; ++index) {
    const Level<kPlaced> level = levels[index - begin];
    if (level.rows == 0) continue;
    HashGridAxis<Scalar> axes[3];
    cell_axes(level, op.tile.levels.smoothstep, position, axes);
    uint32_t rows[kCorners];
    cell_rows(level, axes, rows);
    Row<Table, kFeatures> corners[kCorners];
    load_corners(static_cast<const Table*>(op.table), level, rows, corners);
    Scalar grad[kFeatures];
    load_elements(op.grad_features, row, sample, index * kFeatures, grad);
    Scalar values[kCorners] = {};
#pragma unroll
    for (int i = 0; i < kCorners; ++i) {
#pragma unroll
      for (int f = 0; f < kFeatures; ++f) values[i] += grad[f] * to_scalar(corners[i].values[f]);
    }
    Scalar gradient[3];
    if constexpr (kDerivative) {
      hash_grid_hessian_product(axes, values, direction, gradient);
    } else {
      hash_grid_gradient(axes, values, gradient);
    }
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) sum[axis] += gradient[axis];
  }
  store_vector(op.gradient, sample, sum);
}

unsigned blocks_for(const HashGridTile& tile) {
  return static_cast<unsigned>((tile.levels.n_samples + kThreads - 1) / kThreads);
}

Status tile_status(const HashGridTile& tile, int32_t levels_at_once) {
  if (tile.levels.n_samples > kMaxTileSamples) return "a tile has at most 2^24 samples";
  if (levels_at_once < 1 || levels_at_once > kMaxLevelsPerThread) return "levels at once must lie in [1, 16]";
  return nullptr;
}

// Calls start(std::bool_constant<whether with a direction>, std::bool_constant<whether levels have placements>).
template <typename Start>
void with_kind(const AnyView& direction, const HashGridTile& tile, const Start& start) {
  const auto with_placement = [&](auto derivative) {
    tile.levels.placements != nullptr ? start(derivative, std::true_type()) : start(derivative, std::false_type());
  };
  direction.data != nullptr ? with_placement(std::true_type()) : with_placement(std::false_type());
}

// Calls start(table element, std::integral_constant<int, n_features>), which launches a kernel.
template <typename Start>
Status with_table(ElementType type, int n_features, const Start& start) {
  switch (type) {
    case ElementType::kFloat16:
      return with_features(n_features, [&](auto features) { start(__half(), features); });
    case ElementType::kFloat32:
      return with_features(n_features, [&](auto features) { start(float(), features); });
    case ElementType::kFloat64:
      return with_features(n_features, [&](auto features) { start(double(), features); });
    default:
      return "a table is float16, float32 or float64";
  }
}

}  // namespace

Status hash_grid_tile_encode(const HashGridTileEncode& op, const Launch& launch) {
  if (const Status status = tile_status(op.tile, op.levels_per_thread)) return status;
  if (op.tile.levels.n_samples <= 0) return nullptr;
  const int groups = (op.tile.levels.n_levels + op.levels_per_thread - 1) / op.levels_per_thread;
  const dim3 blocks(blocks_for(op.tile), static_cast<unsigned>(groups));
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  return with_table(op.table_type, op.tile.levels.n_features, [&](auto table, auto features) {
    using Table = decltype(table);
    constexpr int kFeatures = decltype(features)::value;
    const bool row = has_rows(op.output, kFeatures);
    with_kind(op.direction, op.tile, [&](auto derivative, auto placed) {
      encode_kernel<Table, kFeatures, decltype(derivative)::value, decltype(placed)::value>
          <<<blocks, kThreads, 0, stream>>>(op, row);
    });
  });
}

Status hash_grid_tile_position_gradient(const HashGridTilePositionGradient& op, const Launch& launch) {
  if (const Status status = tile_status(op.tile, op.levels_per_launch)) return status;
  if (op.tile.levels.n_samples <= 0) return nullptr;
  const unsigned blocks = blocks_for(op.tile);
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  const int n_levels = op.tile.levels.n_levels;
  return with_table(op.table_type, op.tile.levels.n_features, [&](auto table, auto features) {
    using Table = decltype(table);
    constexpr int kFeatures = decltype(features)::value;
    const bool row = has_rows(op.grad_features, kFeatures);
    for (int begin = 0; begin < n_levels; begin += op.levels_per_launch) {
      const int end = std::min(begin + op.levels_per_launch, n_levels);
      const bool add = begin > 0;
      with_kind(op.direction, op.tile, [&](auto derivative, auto placed) {
        position_gradient_kernel<Table, kFeatures, decltype(derivative)::value, decltype(placed)::value>
            <<<blocks, kThreads, 0, stream>>>(op, row, begin, end, add);
      });
    }
  });
}

}  // namespace dff::cuda
