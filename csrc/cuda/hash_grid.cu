// The hash grid's ops over packed arrays of one type: tiles whose samples lie one after another.
#include <algorithm>
#include <type_traits>

#include "dreamfusion_fast/hash_grid.h"
#include "dreamfusion_fast/hash_grid_tile.h"

namespace dff {
namespace cuda {

namespace {

// One level at a time: its table (4 MB at 2^19 rows of 2 float32) then stays in L2, where all levels would not fit.
constexpr int32_t kLevelsPerThread = 1;
// Below so many samples, a launch for each level would cost more than what L2 saves.
constexpr int64_t kSmallLaunch = 1 << 17;
constexpr int32_t kSamplesPerThread = 8;

template <typename Scalar>
constexpr ElementType kType = std::is_same_v<Scalar, double> ? ElementType::kFloat64 : ElementType::kFloat32;

// The rows from `first` on of [n_samples, columns].
template <typename Scalar>
TileArray rows_from(const Scalar* data, int64_t first, int columns) {
  TileArray array;
  if (data == nullptr) return array;
  array.data = const_cast<Scalar*>(data + first * columns);
  array.sample_stride = static_cast<uint32_t>(columns);
  array.channel_stride = 1;
  array.type = kType<Scalar>;
  return array;
}

// Calls start(tile, its first sample, columns of the encoding) for tiles as large as they may be.
template <typename Scalar, typename Start>
Status for_each_tile(const HashGridLevels& levels, const Scalar* positions, const Start& start) {
  const int columns = levels.n_levels * levels.n_features;
  const int64_t most = std::min<int64_t>(kMaxTileSamples, (int64_t(1) << 31) / columns);
  for (int64_t first = 0; first < levels.n_samples; first += most) {
    HashGridTile tile;
    tile.levels = levels;
    tile.levels.n_samples = std::min(most, levels.n_samples - first);
    tile.positions = rows_from(positions, first, 3);
    if (const Status status = start(tile, first, columns)) return status;
  }
  return nullptr;
}

template <typename Scalar>
Status encode(const HashGridLevels& levels, const Scalar* direction, const Scalar* positions, const Scalar* table,
              Scalar* output, const Launch& launch) {
  return for_each_tile(levels, positions, [&](const HashGridTile& tile, int64_t first, int columns) {
    HashGridTileEncode op;
    op.tile = tile;
    op.table = table;
    op.table_type = kType<Scalar>;
    op.direction = rows_from(direction, first, 3);
    op.output = rows_from(output, first, columns);
    op.levels_per_thread = kLevelsPerThread;
    return hash_grid_tile_encode(op, launch);
  });
}

template <typename Scalar>
Status positions_gradient(const HashGridLevels& levels, const Scalar* direction, const Scalar* grad_output,
                          const Scalar* positions, const Scalar* table, Scalar* gradient, const Launch& launch) {
  return for_each_tile(levels, positions, [&](const HashGridTile& tile, int64_t first, int columns) {
    HashGridTilePositionGradient op;
    op.tile = tile;
    op.table = table;
    op.table_type = kType<Scalar>;
    op.direction = rows_from(direction, first, 3);
    op.grad_features = rows_from(grad_output, first, columns);
    op.gradient = rows_from(gradient, first, 3);
    op.levels_per_launch = tile.levels.n_samples < kSmallLaunch ? kMaxLevelsPerThread : kLevelsPerThread;
    return hash_grid_tile_position_gradient(op, launch);
  });
}

// The table's gradient from the encoding, or (with a direction) from its derivative along the direction.
template <typename Scalar>
Status add_table_gradient(const HashGridLevels& levels, const Scalar* direction, const Scalar* grad_output,
                          const Scalar* positions, Scalar* grad_table, const Launch& launch) {
  return for_each_tile(levels, positions, [&](const HashGridTile& tile, int64_t first, int columns) {
    HashGridTileScatter op;
    op.tile = tile;
    op.direction = rows_from(direction, first, 3);
    (direction == nullptr ? op.grad_features : op.grad_of_along) = rows_from(grad_output, first, columns);
    op.grad_table = grad_table;
    op.samples_per_thread = kSamplesPerThread;
    return hash_grid_tile_scatter(op, launch);
  });
}

}  // namespace

template <typename Scalar>
Status hash_grid_forward(const HashGridForward<Scalar>& op, const Launch& launch) {
  return encode<Scalar>(op.levels, nullptr, op.positions, op.table, op.output, launch);
}

template <typename Scalar>
Status hash_grid_backward_table(const HashGridBackwardTable<Scalar>& op, const Launch& launch) {
  return add_table_gradient<Scalar>(op.levels, nullptr, op.grad_output, op.positions, op.grad_table, launch);
}

template <typename Scalar>
Status hash_grid_backward_positions(const HashGridBackwardPositions<Scalar>& op, const Launch& launch) {
  return positions_gradient<Scalar>(op.levels, nullptr, op.grad_output, op.positions, op.table, op.grad_positions,
                                    launch);
}

template <typename Scalar>
Status hash_grid_backward_backward(const HashGridBackwardBackward<Scalar>& op, const Launch& launch) {
  Status status = nullptr;
  if (op.grad_grad_output != nullptr) {
    status = encode(op.levels, op.direction, op.positions, op.table, op.grad_grad_output, launch);
  }
  if (status == nullptr && op.grad_table != nullptr) {
    status = add_table_gradient(op.levels, op.direction, op.grad_output, op.positions, op.grad_table, launch);
  }
  if (status == nullptr && op.grad_positions != nullptr) {
    status =
        positions_gradient(op.levels, op.direction, op.grad_output, op.positions, op.table, op.grad_positions, launch);
  }
  return status;
}

template Status hash_grid_forward(const HashGridForward<float>&, const Launch&);
template Status hash_grid_forward(const HashGridForward<double>&, const Launch&);
template Status hash_grid_backward_table(const HashGridBackwardTable<float>&, const Launch&);
template Status hash_grid_backward_table(const HashGridBackwardTable<double>&, const Launch&);
template Status hash_grid_backward_positions(const HashGridBackwardPositions<float>&, const Launch&);
template Status hash_grid_backward_positions(const HashGridBackwardPositions<double>&, const Launch&);
template Status hash_grid_backward_backward(const HashGridBackwardBackward<float>&, const Launch&);
template Status hash_grid_backward_backward(const HashGridBackwardBackward<double>&, const Launch&);

}  // namespace cuda
}  // namespace dff
