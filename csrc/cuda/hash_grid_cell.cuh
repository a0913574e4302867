// What the kernels of the hash grid share: a sample's cell, and the rows of its corners in wide loads and wide atomics.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "dreamfusion_fast/hash_grid.h"
#include "parallel.cuh"
#include "row.cuh"
#include "scatter.cuh"

namespace dff::cuda {

// Whether the corners x and x + 1 of a cell come in one load where their rows are neighbours in an aligned pair, as
// they are for every other x. Their addresses share a sector either way; what is saved is a quarter of the addresses
// that L1 looks up, against one more instruction for each pair. On an H100, 2^19 samples, 16 levels: the position's
// gradient takes 143 us with pairs and 134 without, the directional derivative 130 and 126, the encoding 126 and
// 126.
constexpr bool kPairedLoads = false;
// The same for atomics, where the pair saves a quarter of the packets that go to L2: 657 us with, 859 without.
constexpr bool kPairedAtomics = true;

// Whether two rows, counted from an aligned one, make up an aligned pair.
__device__ __forceinline__ bool in_one_pair(uint32_t row, uint32_t other) { return (row ^ other) == 1; }

// The rows of all corners, all asked for before one is used; `table` is aligned to 16 bytes.
template <typename Element, int kFeatures>
__device__ __forceinline__ void load_corners(const Element* table, const HashGridLevel& level,
                                             const uint32_t (&rows)[kCorners],
                                             Row<Element, kFeatures> (&corners)[kCorners]) {
  using One = Row<Element, kFeatures>;
  struct alignas(2 * sizeof(One) <= 16 ? 2 * sizeof(One) : 16) Two {
    One rows[2];
  };
  const One* first = reinterpret_cast<const One*>(table) + level.first_row;
  const uint32_t odd = static_cast<uint32_t>(level.first_row) & 1;  // the level starts with the second of a pair
  constexpr bool kPaired = kPairedLoads && sizeof(Two) <= 16;
#pragma unroll
  for (int i = 0; i < kCorners; i += 2) {
    if (kPaired && in_one_pair(rows[i] + odd, rows[i + 1] + odd)) {
      const uint32_t from_pair = (rows[i] + odd) & 1;
      const Two pair = load_wide(reinterpret_cast<const Two*>(first + rows[i] - from_pair));
      corners[i] = pair.rows[0];
      corners[i + 1] = pair.rows[1];
    } else {
      corners[i] = load_wide(first + rows[i]);
      corners[i + 1] = load_wide(first + rows[i + 1]);
    }
  }
  if constexpr (kPaired) {  // apart from the loads, so that none waits for the one before
#pragma unroll
    for (int i = 0; i < kCorners; i += 2) {
      const uint32_t low = rows[i] + odd;
      if (in_one_pair(low, rows[i + 1] + odd) && (low & 1)) {
        const One second = corners[i];
        corners[i] = corners[i + 1];
        corners[i + 1] = second;
      }
    }
  }
}

// Adds to columns [column, column + kColumns) of the rows of all corners; `table` is aligned to 16 bytes.
// Of a level that is flat, to those of the lower corners: the others are the same rows, with nothing to add.
template <int kFeatures, int kColumns, typename Level, typename Scalar>
__device__ __forceinline__ void atomic_add_corners(Scalar* table, int column, const Level& level,
                                                   const uint32_t (&rows)[kCorners],
                                                   const Scalar (&sums)[kCorners][kColumns]) {
  Scalar* first = table + level.first_row * kFeatures + column;
  const uint32_t odd = static_cast<uint32_t>(level.first_row) & 1;
  constexpr bool kPaired =
      kPairedAtomics && std::is_same_v<Scalar, float> && kColumns == kFeatures && 2 * kFeatures <= kAtomicFloats;
#pragma unroll
  for (int i = 0; i < kCorners; i += 2) {
    if constexpr (std::is_same_v<Level, HashGridPlacedLevel>) {
      if (level.flat && i >= kCorners / 2) break;
    }
    if (kPaired && in_one_pair(rows[i] + odd, rows[i + 1] + odd)) {
      const uint32_t swapped = (rows[i] + odd) & 1;
      Scalar both[2 * kFeatures];
#pragma unroll
      for (int f = 0; f < kFeatures; ++f) {
        both[f] = swapped ? sums[i + 1][f] : sums[i][f];
        both[kFeatures + f] = swapped ? sums[i][f] : sums[i + 1][f];
      }
      atomic_add(first + (rows[i] - swapped) * kFeatures, both);
    } else {
      atomic_add(first + static_cast<int64_t>(rows[i]) * kFeatures, sums[i]);
      atomic_add(first + static_cast<int64_t>(rows[i + 1]) * kFeatures, sums[i + 1]);
    }
  }
}

// Kernels that touch the table are compiled twice: for levels with placements of their own, and without.
template <bool kPlaced>
using Level = std::conditional_t<kPlaced, HashGridPlacedLevel, HashGridLevel>;

template <bool kPlaced>
__device__ __forceinline__ Level<kPlaced> read_level(const HashGridLevels& levels, int index) {
  if constexpr (kPlaced) {
    return hash_grid_placed_level(levels, index);
  } else {
    return hash_grid_level(levels, index);
  }
}

// The cell of a position in a level, and the rows of its corners.
template <typename Scalar>
__device__ __forceinline__ void cell_axes(const HashGridLevel& level, bool smoothstep, const Scalar (&position)[3],
                                          HashGridAxis<Scalar> (&axes)[3]) {
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) {
    axes[axis] = smoothstep ? hash_grid_axis<true>(position[axis], level.resolution)
                            : hash_grid_axis<false>(position[axis], level.resolution);
  }
}

template <typename Scalar>
__device__ __forceinline__ void cell_axes(const HashGridPlacedLevel& level, bool smoothstep,
                                          const Scalar (&position)[3], HashGridAxis<Scalar> (&axes)[3]) {
  smoothstep ? hash_grid_axes<true>(level, position, axes) : hash_grid_axes<false>(level, position, axes);
}

template <typename Scalar>
__device__ __forceinline__ void cell_rows(const HashGridLevel& level, const HashGridAxis<Scalar> (&axes)[3],
                                          uint32_t (&rows)[kCorners]) {
  switch (level.kind) {  // the same for all threads of a block
    case RowKind::kDense:
      hash_grid_rows<RowKind::kDense>(level, axes, rows);
      break;
    case RowKind::kHashedMask:
      hash_grid_rows<RowKind::kHashedMask>(level, axes, rows);
      break;
    case RowKind::kHashedModulo:
      hash_grid_rows<RowKind::kHashedModulo>(level, axes, rows);
      break;
  }
}

template <typename Scalar>
__device__ __forceinline__ void cell_rows(const HashGridPlacedLevel& level, const HashGridAxis<Scalar> (&axes)[3],
                                          uint32_t (&rows)[kCorners]) {
  hash_grid_rows(level, axes, rows);
}

// Calls start(std::integral_constant<int, n_features>), which launches a kernel.
template <typename Start>
Status with_features(int n_features, const Start& start) {
  switch (n_features) {
    case 1:
      start(std::integral_constant<int, 1>());
      break;
    case 2:
      start(std::integral_constant<int, 2>());
      break;
    case 4:
      start(std::integral_constant<int, 4>());
      break;
    case 8:
      start(std::integral_constant<int, 8>());
      break;
    default:
      return "n_features must be 1, 2, 4 or 8";
  }
  return launch_status();
}

}  // namespace dff::cuda
