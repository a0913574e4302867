// Multiresolution hash grid encoding (Mueller et al. 2022, section 3), its gradients by the table and by the positions,
// and the same of its directional derivative, which the backward of the latter gradient needs, and so training on
// normals.
//
// A level is placed as our own fields do it (vertices at multiples of 1 / resolution), or, with HashGridPlacement, as
// any other library does: that is a second kind of level with functions of the same names, so that the first pays
// nothing.
//
// Written per level and per sample. A sample lies in a cell with 8 corners; corner c is the upper one along axis d
// where bit d of c is set. The encoding is sum_c W_c(position) table[row_c]; everything below is a derivative of that
// sum, recomputed from position and table: nothing is stored between the passes.
#pragma once

#include "dreamfusion_fast/common.h"

namespace dff {

constexpr int kCorners = 8;
constexpr int32_t kMaxResolution = 1 << 24;  // as far as a float32 counts in ones

// Loops over corners and edges have to disappear (DFF_UNROLL): only then do their arrays become registers, and only
// then does the compiler vectorise the loop over samples around them.

// How a level lies in space, and how vertices find their rows. Vertex coordinates are position * scale + shift, clamped
// to [low, high]; a cell begins at most at last_cell. A vertex has the row x + side * (y + side * z) modulo the rows,
// without the axes whose stride exceeds the rows; with `hashes`, the hash where side^dims exceeds them.
struct HashGridPlacement {
  float scale, shift;
  float low, high;  // within +-2^30
  float last_cell;  // likewise
  float side;       // vertices along an axis, 1 to 2^24
  float hashes;     // 0 or 1
  float dims;       // 2: the third coordinate is ignored; 3
};

// The levels of a grid, as every op below takes them.
struct HashGridLevels {
  const int64_t* level_offsets;         // [n_levels + 1], first row of each level in the table
  const int32_t* resolutions;           // [n_levels], cells per axis
  const HashGridPlacement* placements;  // [n_levels], or null: vertices at multiples of 1 / resolution
  int64_t n_rows;                       // rows of the table
  int64_t n_samples;
  int32_t n_levels;
  int32_t n_features;  // columns of the table
  bool smoothstep;
};

// Each op below takes a direction or none. With one, the encoding's directional derivative (its Jacobian by the
// position times the direction) takes the place of the encoding.

// The encoding, or its directional derivative.
template <typename Scalar>
struct HashGridEncode {
  HashGridLevels levels;
  const Scalar* direction;  // [n_samples, 3], or null
  const Scalar* positions;  // [n_samples, 3], clamped to [0, 1]
  const Scalar* table;      // [n_rows, n_features]
  Scalar* output;           // [n_samples, n_levels * n_features], out
};

// The gradient of sum(grad_output * output) by the table.
template <typename Scalar>
struct HashGridTableGradient {
  HashGridLevels levels;
  const Scalar* direction;    // [n_samples, 3], or null
  const Scalar* grad_output;  // [n_samples, n_levels * n_features]
  const Scalar* positions;    // [n_samples, 3]
  Scalar* grad_table;         // [n_rows, n_features], added to
};

// The gradient of sum(grad_output * output) by the positions.
template <typename Scalar>
struct HashGridPositionGradient {
  HashGridLevels levels;
  const Scalar* direction;    // [n_samples, 3], or null
  const Scalar* grad_output;  // [n_samples, n_levels * n_features]
  const Scalar* positions;    // [n_samples, 3]
  const Scalar* table;        // [n_rows, n_features]
  Scalar* gradient;           // [n_samples, 3], out
};

// How the vertices of a level find their rows. Known per level, so that the inner loops do not ask.
enum class RowKind { kDense, kHashedMask, kHashedModulo };

struct HashGridLevel {
  int64_t first_row;
  uint32_t rows;
  uint32_t resolution;
  RowKind kind;
};

// A level that does not lie inside the table has rows = 0.
DFF_HD HashGridLevel hash_grid_level(const HashGridLevels& levels, int index) {
  HashGridLevel level;
  level.first_row = levels.level_offsets[index];
  const int64_t rows = levels.level_offsets[index + 1] - level.first_row;
  const int32_t resolution = levels.resolutions[index];
  const bool valid = level.first_row >= 0 && rows > 0 && rows <= int64_t(0xffffffff) && resolution > 0 &&
                     resolution <= kMaxResolution && level.first_row + rows <= levels.n_rows;
  level.rows = valid ? static_cast<uint32_t>(rows) : 0;
  level.resolution = valid ? static_cast<uint32_t>(resolution) : 1;
  const uint64_t side = static_cast<uint64_t>(level.resolution) + 1;
  const bool dense = side <= (uint64_t(1) << 16) && side * side * side <= level.rows;
  level.kind = dense                                  ? RowKind::kDense
               : (level.rows & (level.rows - 1)) == 0 ? RowKind::kHashedMask
                                                      : RowKind::kHashedModulo;
  return level;
}

// A level with a placement of its own.
struct HashGridPlacedLevel : HashGridLevel {
  float scale, shift, low, high;
  int32_t last_cell;
  uint32_t stride_y, stride_z;
  bool hashed;
  bool power_of_two;  // rows
  bool flat;          // two dimensions: the upper corners along z are the lower ones, with weight 0
};

DFF_HD HashGridPlacedLevel hash_grid_placed_level(const HashGridLevels& levels, int index) {
  HashGridPlacedLevel level;
  static_cast<HashGridLevel&>(level) = hash_grid_level(levels, index);
  const HashGridPlacement& from = levels.placements[index];
  level.scale = from.scale;
  level.shift = from.shift;
  level.low = from.low;
  level.high = from.high;
  level.last_cell = static_cast<int32_t>(from.last_cell);
  level.flat = from.dims < 3.0f;
  level.power_of_two = (level.rows & (level.rows - 1)) == 0;
  // In 32 bits, with what overflows there, as in the libraries whose tables are read so.
  const uint32_t side = static_cast<uint32_t>(from.side);
  uint32_t strides[3] = {};
  uint32_t stride = 1;
  for (int axis = 0; axis < (level.flat ? 2 : 3) && stride <= level.rows; ++axis) {
    strides[axis] = stride;
    stride *= side;
  }
  level.stride_y = strides[1];
  level.stride_z = strides[2];
  level.hashed = from.hashes > 0.0f && stride > level.rows;
  return level;
}

template <RowKind kKind>
DFF_HD uint32_t hash_grid_row(const HashGridLevel& level, uint32_t x, uint32_t y, uint32_t z) {
  if (kKind == RowKind::kDense) {
    const uint32_t side = level.resolution + 1;
    return x + side * (y + side * z);
  }
  const uint32_t hash = x ^ (y * 2654435761u) ^ (z * 805459861u);
  return kKind == RowKind::kHashedMask ? hash & (level.rows - 1) : hash % level.rows;
}

DFF_HD uint32_t hash_grid_row(const HashGridPlacedLevel& level, uint32_t x, uint32_t y, uint32_t z) {
  const uint32_t index =
      level.hashed ? x ^ (y * 2654435761u) ^ (z * 805459861u) : x + level.stride_y * y + level.stride_z * z;
  return level.power_of_two ? index & (level.rows - 1) : index % level.rows;
}

// Where a sample lies along one axis: its cell, and the weight of the upper vertex with its derivatives by the
// position.
template <typename Scalar>
struct HashGridAxis {
  uint32_t cell;
  Scalar weight;
  Scalar slope;      // first derivative, zero outside [0, 1], where the position is clamped
  Scalar curvature;  // second derivative
};

// In a cell, `upper` from its lower vertex, with `scale` cells per unit.
template <bool kSmoothstep, typename Scalar>
DFF_HD HashGridAxis<Scalar> hash_grid_axis_in(int32_t cell, Scalar upper, bool outside, Scalar scale) {
  HashGridAxis<Scalar> axis;
  axis.cell = static_cast<uint32_t>(cell);
  if (kSmoothstep) {
    axis.weight = upper * upper * (Scalar(3) - Scalar(2) * upper);
    axis.slope = outside ? Scalar(0) : Scalar(6) * upper * (Scalar(1) - upper) * scale;
    axis.curvature = outside ? Scalar(0) : (Scalar(6) - Scalar(12) * upper) * scale * scale;
  } else {
    axis.weight = upper;
    axis.slope = outside ? Scalar(0) : scale;
    axis.curvature = Scalar(0);
  }
  return axis;
}

template <bool kSmoothstep, typename Scalar>
DFF_HD HashGridAxis<Scalar> hash_grid_axis(Scalar position, uint32_t resolution) {
  const Scalar scale = static_cast<Scalar>(static_cast<int32_t>(resolution));
  const bool outside = position < Scalar(0) || position > Scalar(1);
  // A NaN passes all of this and comes out as a NaN weight in cell 0.
  const Scalar clamped = position < Scalar(0) ? Scalar(0) : position > Scalar(1) ? Scalar(1) : position;
  const Scalar scaled = clamped * scale;
  const Scalar bounded = scaled > Scalar(0) ? scaled : Scalar(0);
  const int32_t last = static_cast<int32_t>(resolution) - 1;
  const int32_t floored = static_cast<int32_t>(bounded);
  const int32_t cell = floored < last ? floored : last;
  const Scalar upper = scaled - static_cast<Scalar>(cell);
  return hash_grid_axis_in<kSmoothstep>(cell, upper, outside, scale);
}

template <bool kSmoothstep, typename Scalar>
DFF_HD HashGridAxis<Scalar> hash_grid_axis(Scalar position, const HashGridPlacedLevel& level) {
  const Scalar scale = level.scale, low = level.low, high = level.high;
  const Scalar placed = position * scale + Scalar(level.shift);
  const bool outside = placed < low || placed > high;
  // As above, a NaN becomes a NaN weight, in some cell.
  const Scalar clamped = placed < low ? low : placed > high ? high : placed;
  const Scalar bounded = clamped > low ? clamped : low;
  const int32_t truncated = static_cast<int32_t>(bounded);
  const int32_t floored = static_cast<Scalar>(truncated) > bounded ? truncated - 1 : truncated;
  const int32_t cell = floored < level.last_cell ? floored : level.last_cell;
  const Scalar upper = clamped - static_cast<Scalar>(cell);
  return hash_grid_axis_in<kSmoothstep>(cell, upper, outside, scale);
}

template <bool kSmoothstep, typename Scalar>
DFF_HD void hash_grid_axes(const HashGridLevel& level, const Scalar (&position)[3], HashGridAxis<Scalar> (&axes)[3]) {
  DFF_UNROLL
  for (int axis = 0; axis < 3; ++axis) axes[axis] = hash_grid_axis<kSmoothstep>(position[axis], level.resolution);
}

template <bool kSmoothstep, typename Scalar>
DFF_HD void hash_grid_axes(const HashGridPlacedLevel& level, const Scalar (&position)[3],
                           HashGridAxis<Scalar> (&axes)[3]) {
  axes[0] = hash_grid_axis<kSmoothstep>(position[0], level);
  axes[1] = hash_grid_axis<kSmoothstep>(position[1], level);
  axes[2] = level.flat ? HashGridAxis<Scalar>{} : hash_grid_axis<kSmoothstep>(position[2], level);
}

template <RowKind kKind, typename Scalar>
DFF_HD void hash_grid_rows(const HashGridLevel& level, const HashGridAxis<Scalar> (&axes)[3],
                           uint32_t (&rows)[kCorners]) {
  DFF_UNROLL
  for (int corner = 0; corner < kCorners; ++corner) {
    rows[corner] = hash_grid_row<kKind>(level, axes[0].cell + (corner & 1), axes[1].cell + (corner >> 1 & 1),
                                        axes[2].cell + (corner >> 2));
  }
}

template <typename Scalar>
DFF_HD void hash_grid_rows(const HashGridPlacedLevel& level, const HashGridAxis<Scalar> (&axes)[3],
                           uint32_t (&rows)[kCorners]) {
  DFF_UNROLL
  for (int corner = 0; corner < kCorners; ++corner) {
    rows[corner] = hash_grid_row(level, axes[0].cell + (corner & 1), axes[1].cell + (corner >> 1 & 1),
                                 axes[2].cell + (level.flat ? 0 : corner >> 2));
  }
}

// W_c: the trilinear weights of the corners.
template <typename Scalar>
DFF_HD void hash_grid_weights(const HashGridAxis<Scalar> (&axes)[3], Scalar (&weights)[kCorners]) {
  const Scalar x[2] = {Scalar(1) - axes[0].weight, axes[0].weight};
  const Scalar y[2] = {Scalar(1) - axes[1].weight, axes[1].weight};
  const Scalar z[2] = {Scalar(1) - axes[2].weight, axes[2].weight};
  DFF_UNROLL
  for (int corner = 0; corner < kCorners; ++corner) {
    weights[corner] = x[corner & 1] * (y[corner >> 1 & 1] * z[corner >> 2]);
  }
}

// sum_d direction_d dW_c / dx_d: the directional derivatives of the weights.
template <typename Scalar>
DFF_HD void hash_grid_weight_derivatives(const HashGridAxis<Scalar> (&axes)[3], const Scalar (&direction)[3],
                                         Scalar (&weights)[kCorners]) {
  const Scalar x[2] = {Scalar(1) - axes[0].weight, axes[0].weight};
  const Scalar y[2] = {Scalar(1) - axes[1].weight, axes[1].weight};
  const Scalar z[2] = {Scalar(1) - axes[2].weight, axes[2].weight};
  const Scalar upper_x = direction[0] * axes[0].slope;
  const Scalar upper_y = direction[1] * axes[1].slope;
  const Scalar upper_z = direction[2] * axes[2].slope;
  DFF_UNROLL
  for (int corner = 0; corner < kCorners; ++corner) {
    const int i = corner & 1, j = corner >> 1 & 1, k = corner >> 2;
    const Scalar dx = i ? upper_x : -upper_x;
    const Scalar dy = j ? upper_y : -upper_y;
    const Scalar dz = k ? upper_z : -upper_z;
    weights[corner] = dx * (y[j] * z[k]) + x[i] * (dy * z[k] + y[j] * dz);
  }
}

// The corner values v_c = sum_f grad_output_f table[row_c][f] as differences along the axes, interpolated along the
// others.
template <typename Scalar>
struct HashGridDifferences {
  Scalar x, y, z;     // d / d weight_x of sum_c W_c v_c, and so on
  Scalar xy, xz, yz;  // mixed second derivatives
};

template <typename Scalar>
DFF_HD Scalar hash_grid_mix(Scalar low, Scalar high, Scalar weight) {
  return low + weight * (high - low);
}

template <typename Scalar>
DFF_HD HashGridDifferences<Scalar> hash_grid_differences(const HashGridAxis<Scalar> (&axes)[3],
                                                         const Scalar (&v)[kCorners]) {
  const Scalar wx = axes[0].weight, wy = axes[1].weight, wz = axes[2].weight;
  // By x on the four edges of the cell along x, and the interpolated values there.
  Scalar by_x[4], at_x[4];
  DFF_UNROLL
  for (int edge = 0; edge < 4; ++edge) {
    by_x[edge] = v[2 * edge + 1] - v[2 * edge];
    at_x[edge] = v[2 * edge] + wx * by_x[edge];
  }
  const Scalar by_y[2] = {at_x[1] - at_x[0], at_x[3] - at_x[2]};
  const Scalar at_y[2] = {at_x[0] + wy * by_y[0], at_x[2] + wy * by_y[1]};
  const Scalar by_xy[2] = {by_x[1] - by_x[0], by_x[3] - by_x[2]};
  const Scalar by_x_at_y[2] = {by_x[0] + wy * by_xy[0], by_x[2] + wy * by_xy[1]};
  HashGridDifferences<Scalar> result;
  result.x = hash_grid_mix(by_x_at_y[0], by_x_at_y[1], wz);
  result.y = hash_grid_mix(by_y[0], by_y[1], wz);
  result.z = at_y[1] - at_y[0];
  result.xy = hash_grid_mix(by_xy[0], by_xy[1], wz);
  result.xz = by_x_at_y[1] - by_x_at_y[0];
  result.yz = by_y[1] - by_y[0];
  return result;
}

// The gradient of sum_c W_c v_c by the position.
template <typename Scalar>
DFF_HD void hash_grid_gradient(const HashGridAxis<Scalar> (&axes)[3], const Scalar (&v)[kCorners],
                               Scalar (&gradient)[3]) {
  const HashGridDifferences<Scalar> by = hash_grid_differences(axes, v);
  gradient[0] = axes[0].slope * by.x;
  gradient[1] = axes[1].slope * by.y;
  gradient[2] = axes[2].slope * by.z;
}

// Its Hessian by the position, times a direction.
template <typename Scalar>
DFF_HD void hash_grid_hessian_product(const HashGridAxis<Scalar> (&axes)[3], const Scalar (&v)[kCorners],
                                      const Scalar (&direction)[3], Scalar (&product)[3]) {
  const HashGridDifferences<Scalar> by = hash_grid_differences(axes, v);
  const Scalar sx = axes[0].slope, sy = axes[1].slope, sz = axes[2].slope;
  const Scalar xy = sx * sy * by.xy, xz = sx * sz * by.xz, yz = sy * sz * by.yz;
  product[0] = direction[0] * axes[0].curvature * by.x + direction[1] * xy + direction[2] * xz;
  product[1] = direction[0] * xy + direction[1] * axes[1].curvature * by.y + direction[2] * yz;
  product[2] = direction[0] * xz + direction[1] * yz + direction[2] * axes[2].curvature * by.z;
}

DFF_LAUNCHER(template <typename Scalar> Status hash_grid_encode(const HashGridEncode<Scalar>& op, const Launch& launch);
             template <typename Scalar>
             Status hash_grid_table_gradient(const HashGridTableGradient<Scalar>& op, const Launch& launch);
             template <typename Scalar>
             Status hash_grid_position_gradient(const HashGridPositionGradient<Scalar>& op, const Launch& launch);)

}  // namespace dff
