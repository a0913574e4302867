// The hash grid's ops over packed arrays of one type: tiles whose samples lie one after another.
#include <algorithm>

#include "dreamfusion_fast/hash_grid.h"
#include "dreamfusion_fast/hash_grid_tile.h"
#include "packed.h"

namespace dff::cuda {

namespace {

// One level at a time: its table (4 MB at 2^19 rows of 2 float32) then stays in L2, where all levels would not fit.
constexpr int32_t kLevelsPerThread = 1;
// Below so many samples, a launch for each level would cost more than what L2 saves.
constexpr int64_t kSmallLaunch = 1 << 17;
constexpr int32_t kSamplesPerThread = 8;

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

}  // namespace

template <typename Scalar>
Status hash_grid_encode(const HashGridEncode<Scalar>& op, const Launch& launch) {
  return for_each_tile(op.levels, op.positions, [&](const HashGridTile& tile, int64_t first, int columns) {
    HashGridTileEncode part;
    part.tile = tile;
    part.table = op.table;
    part.table_type = kType<Scalar>;
    part.direction = rows_from(op.direction, first, 3);
    part.output = rows_from(op.output, first, columns);
    part.levels_per_thread = kLevelsPerThread;
    return hash_grid_tile_encode(part, launch);
  });
}

template <typename Scalar>
Status hash_grid_table_gradient(const HashGridTableGradient<Scalar>& op, const Launch& launch) {
  return for_each_tile(op.levels, op.positions, [&](const HashGridTile& tile, int64_t first, int columns) {
    HashGridTileScatter part;
    part.tile = tile;
    part.direction = rows_from(op.direction, first, 3);
    AnyView& grad = op.direction == nullptr ? part.grad_features : part.grad_derivative;
    grad = rows_from(op.grad_output, first, columns);
    part.grad_table = op.grad_table;
    part.samples_per_thread = kSamplesPerThread;
    return hash_grid_tile_scatter(part, launch);
  });
}

template <typename Scalar>
Status hash_grid_position_gradient(const HashGridPositionGradient<Scalar>& op, const Launch& launch) {
  return for_each_tile(op.levels, op.positions, [&](const HashGridTile& tile, int64_t first, int columns) {
    HashGridTilePositionGradient part;
    part.tile = tile;
    part.table = op.table;
    part.table_type = kType<Scalar>;
    part.direction = rows_from(op.direction, first, 3);
    part.grad_features = rows_from(op.grad_output, first, columns);
    part.gradient = rows_from(op.gradient, first, 3);
    part.levels_per_launch = tile.levels.n_samples < kSmallLaunch ? kMaxLevelsPerThread : kLevelsPerThread;
    return hash_grid_tile_position_gradient(part, launch);
  });
}

DFF_FOR_FLOATS(hash_grid_encode, HashGridEncode);
DFF_FOR_FLOATS(hash_grid_table_gradient, HashGridTableGradient);
DFF_FOR_FLOATS(hash_grid_position_gradient, HashGridPositionGradient);

}  // namespace dff::cuda
