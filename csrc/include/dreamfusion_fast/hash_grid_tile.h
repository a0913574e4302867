// The multiresolution hash grid over one tile of samples, on a GPU: arrays that the caller owns, of any strides and of
// several types, and a number of samples that only the GPU knows. The arithmetic is that of hash_grid.h.
#pragma once

#include "dreamfusion_fast/hash_grid.h"
#include "dreamfusion_fast/view.h"

namespace dff {

constexpr int kMaxLevelsPerThread = 16;

// Everything below is computed in the type of the positions, which directions and gradients by positions share:
// float64, which every other array then has, too, or float32.
struct HashGridTile {
  HashGridLevels levels;           // n_samples: at most kMaxTileSamples
  const int32_t* count = nullptr;  // on the GPU: only samples below it are touched; null: all
  AnyView positions;               // [n_samples, 3], clamped to [0, 1]
};

// The encoding, or (with a direction) its directional derivative. NaN for a level outside the table.
struct HashGridTileEncode {
  HashGridTile tile;
  const void* table;  // [n_rows, n_features], aligned to 16 bytes
  ElementType table_type;
  AnyView direction;          // [n_samples, 3] or none
  AnyView output;             // [n_samples, n_levels * n_features], out
  int32_t levels_per_thread;  // at most kMaxLevelsPerThread
};

// The gradient of sum(grad_features * encoding) by the positions, or (with a direction) that of the directional
// derivative in the encoding's place.
struct HashGridTilePositionGradient {
  HashGridTile tile;
  const void* table;  // [n_rows, n_features], aligned to 16 bytes
  ElementType table_type;
  AnyView direction;          // [n_samples, 3] or none
  AnyView grad_features;      // [n_samples, n_levels * n_features]
  AnyView gradient;           // [n_samples, 3], out
  int32_t levels_per_launch;  // at most kMaxLevelsPerThread
};

// The table's gradient from the encoding (grad_features) and from its directional derivative (grad_derivative), in one
// pass. Samples whose gradients are zero are skipped, whatever their position.
struct HashGridTileScatter {
  HashGridTile tile;
  AnyView grad_features;    // [n_samples, n_levels * n_features] or none
  AnyView direction;        // [n_samples, 3], or none, like the next
  AnyView grad_derivative;  // [n_samples, n_levels * n_features]
  void* grad_table;         // [n_rows, n_features] of the positions' type, aligned to 16 bytes, added to
  int32_t samples_per_thread;
};

namespace cuda {

Status hash_grid_tile_encode(const HashGridTileEncode& op, const Launch& launch);
Status hash_grid_tile_position_gradient(const HashGridTilePositionGradient& op, const Launch& launch);
Status hash_grid_tile_scatter(const HashGridTileScatter& op, const Launch& launch);

}  // namespace cuda

}  // namespace dff
