// The triplane's ops over packed arrays of one type: tiles whose samples lie one after another.
#include <algorithm>

#include "dreamfusion_fast/triplane.h"
#include "dreamfusion_fast/triplane_tile.h"
#include "packed.h"

namespace dff::cuda {

namespace {

constexpr int32_t kSamplesPerThread = 8;

// Calls start(tile, its first sample, columns of the encoding) for tiles as large as they may be.
template <typename Scalar, typename Start>
Status for_each_tile(const Triplanes& shape, const Scalar* positions, const Start& start) {
  const int columns = kPlanes * shape.n_features;
  const int64_t most = std::min<int64_t>(kMaxTileSamples, (int64_t(1) << 31) / columns);
  for (int64_t first = 0; first < shape.n_samples; first += most) {
    TriplaneTile tile;
    tile.shape = shape;
    tile.shape.n_samples = std::min(most, shape.n_samples - first);
    if (shape.scenes != nullptr) tile.shape.scenes = shape.scenes + first;
    tile.positions = rows_from(positions, first, 3);
    if (const Status status = start(tile, first, columns)) return status;
  }
  return nullptr;
}

}  // namespace

template <typename Scalar>
Status triplane_encode(const TriplaneEncode<Scalar>& op, const Launch& launch) {
  return for_each_tile(op.shape, op.positions, [&](const TriplaneTile& tile, int64_t first, int columns) {
    TriplaneTileEncode part;
    part.tile = tile;
    part.planes = op.planes;
    part.planes_type = kType<Scalar>;
    part.direction = rows_from(op.direction, first, 3);
    part.output = rows_from(op.output, first, columns);
    return triplane_tile_encode(part, launch);
  });
}

template <typename Scalar>
Status triplane_planes_gradient(const TriplanePlanesGradient<Scalar>& op, const Launch& launch) {
  return for_each_tile(op.shape, op.positions, [&](const TriplaneTile& tile, int64_t first, int columns) {
    TriplaneTileScatter part;
    part.tile = tile;
    part.direction = rows_from(op.direction, first, 3);
    AnyView& grad = op.direction == nullptr ? part.grad_features : part.grad_derivative;
    grad = rows_from(op.grad_output, first, columns);
    part.grad_planes = op.grad_planes;
    part.samples_per_thread = kSamplesPerThread;
    return triplane_tile_scatter(part, launch);
  });
}

template <typename Scalar>
Status triplane_position_gradient(const TriplanePositionGradient<Scalar>& op, const Launch& launch) {
  return for_each_tile(op.shape, op.positions, [&](const TriplaneTile& tile, int64_t first, int columns) {
    TriplaneTilePositionGradient part;
    part.tile = tile;
    part.planes = op.planes;
    part.planes_type = kType<Scalar>;
    part.direction = rows_from(op.direction, first, 3);
    part.grad_features = rows_from(op.grad_output, first, columns);
    part.gradient = rows_from(op.gradient, first, 3);
    return triplane_tile_position_gradient(part, launch);
  });
}

DFF_FOR_FLOATS(triplane_encode, TriplaneEncode);
DFF_FOR_FLOATS(triplane_planes_gradient, TriplanePlanesGradient);
DFF_FOR_FLOATS(triplane_position_gradient, TriplanePositionGradient);

}  // namespace dff::cuda
