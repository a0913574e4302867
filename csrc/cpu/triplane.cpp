#include "dreamfusion_fast/triplane.h"

#include <algorithm>
#include <type_traits>

#include "parallel.h"

namespace dff::cpu {

namespace {

constexpr int64_t kSamplesPerPiece = 256;  // three planes of four or nine vertices with some 16 features: 50 us
constexpr int kLanes = 8;                  // features that the compiler takes at once

// Calls run(std::integral_constant<int, degree>).
template <typename Run>
Status with_degree(const Triplanes& shape, const Run& run) {
  const int32_t least = shape.degree + 1;
  if (shape.degree != 1 && shape.degree != 2) return "degree must be 1 or 2";
  if (std::min(shape.height, shape.width) < least) return "a plane is smaller than one cell";
  if (std::max(shape.height, shape.width) > kMaxPlaneSide) return "a plane has at most 2^14 vertices a side";
  shape.degree == 1 ? run(std::integral_constant<int, 1>()) : run(std::integral_constant<int, 2>());
  return nullptr;
}

int32_t scene_of(const Triplanes& shape, int64_t sample) { return shape.scenes == nullptr ? 0 : shape.scenes[sample]; }

template <typename Scalar>
void load(const Scalar* vectors, int64_t sample, Scalar (&out)[3]) {
  for (int axis = 0; axis < 3; ++axis) out[axis] = vectors == nullptr ? Scalar(0) : vectors[3 * sample + axis];
}

// The weights of a cell's vertices, or their directional derivatives, and where the vertices' features begin.
template <int kDegree, typename Scalar>
struct Vertices {
  static constexpr int kCount = (kDegree + 1) * (kDegree + 1);
  Scalar weights[kCount];
  int64_t offsets[kCount];

  Vertices(const Triplanes& shape, const TriplaneCell<kDegree, Scalar>& cell, int plane, const Scalar* direction) {
    const Scalar along_columns = direction == nullptr ? Scalar(0) : direction[triplane_column_axis(plane)];
    const Scalar along_rows = direction == nullptr ? Scalar(0) : direction[triplane_row_axis(plane)];
    for (int j = 0; j <= kDegree; ++j) {
      for (int i = 0; i <= kDegree; ++i) {
        const int vertex = j * (kDegree + 1) + i;
        weights[vertex] = direction == nullptr ? cell.weight(i, j) : cell.derivative(i, j, along_columns, along_rows);
        offsets[vertex] = static_cast<int64_t>(cell.texel(i, j, shape.width)) * shape.n_features;
      }
    }
  }
};

// out [n_features] = the weighted sum of the vertices' features.
template <int kDegree, typename Scalar>
void interpolate(const Vertices<kDegree, Scalar>& vertices, const Scalar* plane, int n_features, Scalar* out) {
  constexpr int kSide = kDegree + 1;
  int first = 0;
  for (; first + kLanes <= n_features; first += kLanes) {
    Scalar sums[kLanes] = {};
    // In two loops, each short enough to disappear: only then do the sums stay in a register.
    DFF_UNROLL
    for (int j = 0; j < kSide; ++j) {
      DFF_UNROLL
      for (int i = 0; i < kSide; ++i) {
        const Scalar weight = vertices.weights[j * kSide + i];
        const Scalar* row = plane + vertices.offsets[j * kSide + i] + first;
        for (int lane = 0; lane < kLanes; ++lane) sums[lane] += weight * row[lane];
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) out[first + lane] = sums[lane];
  }
  for (; first < n_features; ++first) {
    Scalar sum = 0;
    for (int vertex = 0; vertex < vertices.kCount; ++vertex) {
      sum += vertices.weights[vertex] * plane[vertices.offsets[vertex] + first];
    }
    out[first] = sum;
  }
}

template <typename Scalar>
Scalar product(const Scalar* a, const Scalar* b, int count) {
  Scalar sums[kLanes] = {}, rest = 0;
  int first = 0;
  for (; first + kLanes <= count; first += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += a[first + lane] * b[first + lane];
  }
  for (; first < count; ++first) rest += a[first] * b[first];
  for (int lane = 0; lane < kLanes; ++lane) rest += sums[lane];
  return rest;
}

template <int kDegree, typename Scalar>
void encode(const TriplaneEncode<Scalar>& op, const Launch& launch) {
  const Triplanes& shape = op.shape;
  parallel_ranges(shape.n_samples, launch.threads, kSamplesPerPiece, [&](int64_t begin, int64_t end) {
    for (int64_t sample = begin; sample < end; ++sample) {
      Scalar position[3], direction[3];
      load(op.positions, sample, position);
      load(op.direction, sample, direction);
      for (int plane = 0; plane < kPlanes; ++plane) {
        Scalar* out = op.output + (sample * kPlanes + plane) * shape.n_features;
        const int64_t offset = triplane_offset(shape, scene_of(shape, sample), plane);
        if (offset < 0) {
          std::fill(out, out + shape.n_features, std::numeric_limits<Scalar>::quiet_NaN());
          continue;
        }
        const auto cell = triplane_cell<kDegree>(shape, plane, position);
        const Vertices<kDegree, Scalar> vertices(shape, cell, plane, op.direction == nullptr ? nullptr : direction);
        interpolate(vertices, op.planes + offset, shape.n_features, out);
      }
    }
  });
}

template <int kDegree, bool kSecond, typename Scalar>
void position_gradient(const TriplanePositionGradient<Scalar>& op, const Launch& launch) {
  const Triplanes& shape = op.shape;
  parallel_ranges(shape.n_samples, launch.threads, kSamplesPerPiece, [&](int64_t begin, int64_t end) {
    for (int64_t sample = begin; sample < end; ++sample) {
      Scalar position[3], direction[3], sum[3] = {};
      load(op.positions, sample, position);
      load(op.direction, sample, direction);
      for (int plane = 0; plane < kPlanes; ++plane) {
        const int64_t offset = triplane_offset(shape, scene_of(shape, sample), plane);
        if (offset < 0) continue;
        const auto cell = triplane_cell<kDegree>(shape, plane, position);
        const Vertices<kDegree, Scalar> vertices(shape, cell, plane, nullptr);
        const Scalar* grad = op.grad_output + (sample * kPlanes + plane) * shape.n_features;
        Scalar values[Vertices<kDegree, Scalar>::kCount];
        for (int vertex = 0; vertex < vertices.kCount; ++vertex) {
          values[vertex] = product(grad, op.planes + offset + vertices.offsets[vertex], shape.n_features);
        }
        const int column = triplane_column_axis(plane), row = triplane_row_axis(plane);
        Scalar by_column, by_row;
        triplane_gradient<kDegree, kSecond>(cell, values, direction[column], direction[row], &by_column, &by_row);
        sum[column] += by_column;
        sum[row] += by_row;
      }
      for (int axis = 0; axis < 3; ++axis) op.gradient[3 * sample + axis] = sum[axis];
    }
  });
}

// No atomics and no copies of the planes: of n threads, each owns every n-th row of each plane, and goes through all
// samples. So each vertex receives its terms in the order of the samples, and the sum does not depend on the number of
// threads. Rows in turn, not bands of them, since most samples are in the middle.
template <int kDegree, typename Scalar>
void planes_gradient(const TriplanePlanesGradient<Scalar>& op, const Launch& launch) {
  const Triplanes& shape = op.shape;
  const int owners = std::max(std::min<int>(launch.threads, shape.height), 1);
  const auto own = [&](int64_t owner) {
    for (int64_t sample = 0; sample < shape.n_samples; ++sample) {
      Scalar position[3], direction[3];
      load(op.positions, sample, position);
      load(op.direction, sample, direction);
      for (int plane = 0; plane < kPlanes; ++plane) {
        const int64_t offset = triplane_offset(shape, scene_of(shape, sample), plane);
        if (offset < 0) continue;
        const auto cell = triplane_cell<kDegree>(shape, plane, position);
        const Vertices<kDegree, Scalar> vertices(shape, cell, plane, op.direction == nullptr ? nullptr : direction);
        const Scalar* grad = op.grad_output + (sample * kPlanes + plane) * shape.n_features;
        for (int j = 0; j <= kDegree; ++j) {
          if ((cell.rows.cell + j) % owners != owner) continue;
          for (int i = 0; i <= kDegree; ++i) {
            const int vertex = j * (kDegree + 1) + i;
            Scalar* to = op.grad_planes + offset + vertices.offsets[vertex];
            for (int f = 0; f < shape.n_features; ++f) to[f] += vertices.weights[vertex] * grad[f];
          }
        }
      }
    }
  };
  for_each(owners, launch, own, 1);
}

}  // namespace

template <typename Scalar>
Status triplane_encode(const TriplaneEncode<Scalar>& op, const Launch& launch) {
  return with_degree(op.shape, [&](auto degree) { encode<decltype(degree)::value>(op, launch); });
}

template <typename Scalar>
Status triplane_planes_gradient(const TriplanePlanesGradient<Scalar>& op, const Launch& launch) {
  return with_degree(op.shape, [&](auto degree) { planes_gradient<decltype(degree)::value>(op, launch); });
}

template <typename Scalar>
Status triplane_position_gradient(const TriplanePositionGradient<Scalar>& op, const Launch& launch) {
  return with_degree(op.shape, [&](auto degree) {
    constexpr int kDegree = decltype(degree)::value;
    op.direction == nullptr ? position_gradient<kDegree, false>(op, launch)
                            : position_gradient<kDegree, true>(op, launch);
  });
}

DFF_FOR_FLOATS(triplane_encode, TriplaneEncode);
DFF_FOR_FLOATS(triplane_planes_gradient, TriplanePlanesGradient);
DFF_FOR_FLOATS(triplane_position_gradient, TriplanePositionGradient);

}  // namespace dff::cpu
