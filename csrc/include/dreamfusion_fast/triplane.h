// Triplane encoding (Chan et al. 2022, "Efficient Geometry-aware 3D Generative Adversarial Networks", section 4.1), its
// gradients by the planes and by the positions, and the same of its directional derivative, which the backward of the
// latter gradient needs, and so training on normals.
//
// A scene is three planes of features, over (x, y), (x, z) and (y, z). A plane is read as a tensor product of uniform
// B-splines of degree 1 (bilinear) or 2 (nine vertices, and a continuous first derivative), whose coefficients are the
// plane's vertices. Along an axis with N vertices there are N - degree cells, and a position in cell c is weighted over
// the vertices c to c + degree. The encoding of a plane is sum_ij b_j a_i plane[row + j][column + i]; everything below
// is a derivative of that sum, recomputed from position and planes: nothing is stored between the passes.
#pragma once

#include <limits>

#include "dreamfusion_fast/common.h"

namespace dff {

constexpr int kPlanes = 3;
constexpr int32_t kMaxPlaneSide = 1 << 14;  // texels of a plane are counted in 32 bits

// The planes of one or more scenes, as every op below takes them: [n_scenes, 3, height, width, n_features].
struct Triplanes {
  const int32_t* scenes;  // [n_samples], of which scene each sample is; null: all of scene 0
  int64_t n_scenes;
  int64_t n_samples;
  int32_t height;
  int32_t width;
  int32_t n_features;
  int32_t degree;  // 1 or 2
};

// Each op below takes a direction or none. With one, the encoding's directional derivative (its Jacobian by the
// position times the direction) takes the place of the encoding. A sample of a scene that there is not is NaN, and adds
// nothing to gradients.

// The encoding, or its directional derivative.
template <typename Scalar>
struct TriplaneEncode {
  Triplanes shape;
  const Scalar* direction;  // [n_samples, 3], or null
  const Scalar* positions;  // [n_samples, 3], clamped to [0, 1]
  const Scalar* planes;     // [n_scenes, 3, height, width, n_features]
  Scalar* output;           // [n_samples, 3 * n_features], out
};

// The gradient of sum(grad_output * output) by the planes.
template <typename Scalar>
struct TriplanePlanesGradient {
  Triplanes shape;
  const Scalar* direction;    // [n_samples, 3], or null
  const Scalar* grad_output;  // [n_samples, 3 * n_features]
  const Scalar* positions;    // [n_samples, 3]
  Scalar* grad_planes;        // [n_scenes, 3, height, width, n_features], added to
};

// The gradient of sum(grad_output * output) by the positions.
template <typename Scalar>
struct TriplanePositionGradient {
  Triplanes shape;
  const Scalar* direction;    // [n_samples, 3], or null
  const Scalar* grad_output;  // [n_samples, 3 * n_features]
  const Scalar* positions;    // [n_samples, 3]
  const Scalar* planes;       // [n_scenes, 3, height, width, n_features]
  Scalar* gradient;           // [n_samples, 3], out
};

// The axes of a plane: along its rows, `width` vertices, and across them, `height` vertices.
DFF_HD int triplane_column_axis(int plane) { return plane == 2 ? 1 : 0; }
DFF_HD int triplane_row_axis(int plane) { return plane == 0 ? 1 : 2; }

// Where a sample lies along one axis of a plane: its cell, and the weights of the vertices from there on with their
// derivatives by the position, which are zero outside [0, 1], where the position is clamped.
template <int kDegree, typename Scalar>
struct TriplaneAxis {
  int32_t cell;
  Scalar weight[kDegree + 1];
  Scalar slope[kDegree + 1];
  Scalar curvature[kDegree + 1];
};

template <int kDegree, typename Scalar>
DFF_HD TriplaneAxis<kDegree, Scalar> triplane_axis(Scalar position, int32_t vertices) {
  static_assert(kDegree == 1 || kDegree == 2);
  const int32_t cells = vertices - kDegree;
  const bool outside = position < Scalar(0) || position > Scalar(1);
  // A NaN passes all of this and comes out as NaN weights in cell 0.
  const Scalar clamped = position < Scalar(0) ? Scalar(0) : position > Scalar(1) ? Scalar(1) : position;
  const Scalar scaled = clamped * static_cast<Scalar>(cells);
  const Scalar bounded = scaled > Scalar(0) ? scaled : Scalar(0);
  const int32_t floored = static_cast<int32_t>(bounded);
  TriplaneAxis<kDegree, Scalar> axis;
  axis.cell = floored < cells - 1 ? floored : cells - 1;
  const Scalar u = scaled - static_cast<Scalar>(axis.cell), rest = Scalar(1) - u;
  const Scalar scale = outside ? Scalar(0) : static_cast<Scalar>(cells);
  if (kDegree == 1) {
    axis.weight[0] = rest;
    axis.weight[1] = u;
    axis.slope[0] = -scale;
    axis.slope[1] = scale;
    axis.curvature[0] = axis.curvature[1] = Scalar(0);
  } else {
    constexpr int kLast = kDegree;  // the index 2, which the branch for degree 1 must not name
    axis.weight[0] = Scalar(0.5) * rest * rest;
    axis.weight[1] = Scalar(0.5) + u * rest;
    axis.weight[kLast] = Scalar(0.5) * u * u;
    axis.slope[0] = -rest * scale;
    axis.slope[1] = (rest - u) * scale;
    axis.slope[kLast] = u * scale;
    axis.curvature[0] = axis.curvature[kLast] = scale * scale;
    axis.curvature[1] = Scalar(-2) * scale * scale;
  }
  return axis;
}

// A sample's place in one plane of its scene.
template <int kDegree, typename Scalar>
struct TriplaneCell {
  TriplaneAxis<kDegree, Scalar> columns, rows;

  // Of vertex (i, j) of the cell, in the plane.
  DFF_HD int32_t texel(int i, int j, int32_t width) const { return (rows.cell + j) * width + columns.cell + i; }

  DFF_HD Scalar weight(int i, int j) const { return columns.weight[i] * rows.weight[j]; }

  // The directional derivative of the weight.
  DFF_HD Scalar derivative(int i, int j, Scalar along_columns, Scalar along_rows) const {
    return along_columns * (columns.slope[i] * rows.weight[j]) + along_rows * (columns.weight[i] * rows.slope[j]);
  }
};

template <int kDegree, typename Scalar>
DFF_HD TriplaneCell<kDegree, Scalar> triplane_cell(const Triplanes& shape, int plane, const Scalar (&position)[3]) {
  // By comparisons: an array that is indexed at run time would leave the registers of a GPU.
  const Scalar column = plane == 2 ? position[1] : position[0];
  const Scalar row = plane == 0 ? position[1] : position[2];
  return {triplane_axis<kDegree>(column, shape.width), triplane_axis<kDegree>(row, shape.height)};
}

// The first element of a plane, or -1 for a scene that there is not.
DFF_HD int64_t triplane_offset(const Triplanes& shape, int32_t scene, int plane) {
  if (scene < 0 || scene >= shape.n_scenes) return -1;
  return (static_cast<int64_t>(scene) * kPlanes + plane) * shape.height * shape.width * shape.n_features;
}

// The gradient of sum_ij W_ij v_ij by the position, v the vertices' values [j * (kDegree + 1) + i]; or, with a
// direction, its Hessian times that.
template <int kDegree, bool kSecond, typename Scalar>
DFF_HD void triplane_gradient(const TriplaneCell<kDegree, Scalar>& cell,
                              const Scalar (&values)[(kDegree + 1) * (kDegree + 1)], Scalar along_columns,
                              Scalar along_rows, Scalar* by_column, Scalar* by_row) {
  Scalar x = 0, y = 0, xx = 0, xy = 0, yy = 0;
  DFF_UNROLL
  for (int j = 0; j <= kDegree; ++j) {
    Scalar at = 0, slope = 0, curvature = 0;
    DFF_UNROLL
    for (int i = 0; i <= kDegree; ++i) {
      const Scalar value = values[j * (kDegree + 1) + i];
      at += cell.columns.weight[i] * value;
      slope += cell.columns.slope[i] * value;
      curvature += cell.columns.curvature[i] * value;
    }
    x += cell.rows.weight[j] * slope;
    y += cell.rows.slope[j] * at;
    xx += cell.rows.weight[j] * curvature;
    xy += cell.rows.slope[j] * slope;
    yy += cell.rows.curvature[j] * at;
  }
  *by_column = kSecond ? along_columns * xx + along_rows * xy : x;
  *by_row = kSecond ? along_columns * xy + along_rows * yy : y;
}

DFF_LAUNCHER(template <typename Scalar> Status triplane_encode(const TriplaneEncode<Scalar>& op, const Launch& launch);
             template <typename Scalar>
             Status triplane_planes_gradient(const TriplanePlanesGradient<Scalar>& op, const Launch& launch);
             template <typename Scalar>
             Status triplane_position_gradient(const TriplanePositionGradient<Scalar>& op, const Launch& launch);)

}  // namespace dff
