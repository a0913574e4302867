// The triplane over one tile of samples, on a GPU: arrays that the caller owns, of any strides and of several types,
// and a number of samples that only the GPU knows. The arithmetic is that of triplane.h.
#pragma once

#include "dreamfusion_fast/triplane.h"
#include "dreamfusion_fast/view.h"

namespace dff {

// Everything below is computed in the type of the positions, which directions and gradients by positions share:
// float64, which every other array then has, too, or float32.
struct TriplaneTile {
  Triplanes shape;                 // n_samples: at most kMaxTileSamples
  const int32_t* count = nullptr;  // on the GPU: only samples below it are touched; null: all
  AnyView positions;               // [n_samples, 3], clamped to [0, 1]
};

// The encoding, or (with a direction) its directional derivative.
struct TriplaneTileEncode {
  TriplaneTile tile;
  const void* planes;  // [n_scenes, 3, height, width, n_features], aligned to 16 bytes
  ElementType planes_type;
  AnyView direction;  // [n_samples, 3] or none
  AnyView output;     // [n_samples, 3 * n_features], out
};

// The gradient of sum(grad_features * encoding) by the positions, or (with a direction) that of the directional
// derivative in the encoding's place.
struct TriplaneTilePositionGradient {
  TriplaneTile tile;
  const void* planes;  // [n_scenes, 3, height, width, n_features], aligned to 16 bytes
  ElementType planes_type;
  AnyView direction;      // [n_samples, 3] or none
  AnyView grad_features;  // [n_samples, 3 * n_features]
  AnyView gradient;       // [n_samples, 3], out
};

// The planes' gradient from the encoding (grad_features) and from its directional derivative (grad_derivative), in one
// pass. Samples whose gradients are zero are skipped, whatever their position.
struct TriplaneTileScatter {
  TriplaneTile tile;
  AnyView grad_features;    // [n_samples, 3 * n_features] or none
  AnyView direction;        // [n_samples, 3], or none, like the next
  AnyView grad_derivative;  // [n_samples, 3 * n_features]
  void* grad_planes;        // [n_scenes, 3, height, width, n_features] of the positions' type, aligned to 16 bytes
  int32_t samples_per_thread;
};

namespace cuda {

Status triplane_tile_encode(const TriplaneTileEncode& op, const Launch& launch);
Status triplane_tile_position_gradient(const TriplaneTilePositionGradient& op, const Launch& launch);
Status triplane_tile_scatter(const TriplaneTileScatter& op, const Launch& launch);

}  // namespace cuda

}  // namespace dff
