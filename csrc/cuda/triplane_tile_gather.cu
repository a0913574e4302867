// Encoding of a tile, its directional derivative, and its gradient by the positions: what reads the planes.
#include <limits>

#include "triplane_tile.cuh"

namespace dff::cuda {

namespace {

// Encoding: one thread per sample and plane; blockIdx.y is the plane. Gradient by the position: one thread per sample.
// A thread goes through the features of its vertices, which are one run of memory each, a few at a time. Successive
// threads have successive samples, so that channel-major arrays are read and written in whole sectors.
constexpr int kThreads = 128;

template <typename Element>
using ScalarOf = std::conditional_t<std::is_same_v<Element, double>, double, float>;

// The vertices of a cell, whose features are asked for together before one is used.
template <typename Element, int kDegree, int kWidth>
struct VertexRows {
  const Element* first;  // of the features of vertex (0, 0)
  int64_t row_stride;    // elements
  int32_t n_features;

  template <typename Scalar>
  __device__ __forceinline__ VertexRows(const Triplanes& shape, const void* planes, int64_t offset,
                                        const TriplaneCell<kDegree, Scalar>& cell)
      : first(static_cast<const Element*>(planes) + offset +
              static_cast<int64_t>(cell.texel(0, 0, shape.width)) * shape.n_features),
        row_stride(static_cast<int64_t>(shape.width) * shape.n_features),
        n_features(shape.n_features) {}

  __device__ __forceinline__ void load(int feature, Row<Element, kWidth> (&rows)[(kDegree + 1) * (kDegree + 1)]) const {
#pragma unroll
    for (int j = 0; j <= kDegree; ++j) {
#pragma unroll
      for (int i = 0; i <= kDegree; ++i) {
        const Element* from = first + j * row_stride + i * n_features + feature;
        rows[j * (kDegree + 1) + i] = load_wide(reinterpret_cast<const Row<Element, kWidth>*>(from));
      }
    }
  }
};

// The part of a direction along the columns, and across the rows, of a plane.
template <typename Scalar>
__device__ __forceinline__ Scalar along_columns(int plane, const Scalar (&direction)[3]) {
  return plane == 2 ? direction[1] : direction[0];
}

template <typename Scalar>
__device__ __forceinline__ Scalar along_rows(int plane, const Scalar (&direction)[3]) {
  return plane == 0 ? direction[1] : direction[2];
}

template <typename Element, int kDegree, int kWidth, bool kDerivative>
__global__ void __launch_bounds__(kThreads) encode_kernel(const TriplaneTileEncode op, bool row) {
  using Scalar = ScalarOf<Element>;
  constexpr int kCount = (kDegree + 1) * (kDegree + 1);
  const Triplanes& shape = op.tile.shape;
  const uint32_t n_samples = live_samples(op.tile.count, shape.n_samples);
  const uint32_t sample = blockIdx.x * kThreads + threadIdx.x;
  const int plane = static_cast<int>(blockIdx.y);
  if (sample >= n_samples) return;

  Scalar position[3], direction[3] = {};
  load_vector(op.tile.positions, sample, position);
  if (kDerivative) load_vector(op.direction, sample, direction);
  const int64_t offset = triplane_offset(shape, scene_of(shape, sample), plane);
  if (offset < 0) {  // loud, and without waiting: the host cannot check this where it would not synchronise
    for (int feature = 0; feature < shape.n_features; ++feature) {
      store_element(op.output, sample, plane * shape.n_features + feature, std::numeric_limits<Scalar>::quiet_NaN());
    }
    return;
  }
  const TriplaneCell<kDegree, Scalar> cell = triplane_cell<kDegree>(shape, plane, position);
  Scalar weights[kCount];
#pragma unroll
  for (int j = 0; j <= kDegree; ++j) {
#pragma unroll
    for (int i = 0; i <= kDegree; ++i) {
      weights[j * (kDegree + 1) + i] =
          kDerivative ? cell.derivative(i, j, along_columns(plane, direction), along_rows(plane, direction))
                      : cell.weight(i, j);
    }
  }
  const VertexRows<Element, kDegree, kWidth> vertices(shape, op.planes, offset, cell);
#pragma unroll 1
  for (int feature = 0; feature < shape.n_features; feature += kWidth) {
    Row<Element, kWidth> rows[kCount];
    vertices.load(feature, rows);
    Scalar output[kWidth] = {};
#pragma unroll
    for (int vertex = 0; vertex < kCount; ++vertex) {
#pragma unroll
      for (int f = 0; f < kWidth; ++f) output[f] += weights[vertex] * to_scalar(rows[vertex].values[f]);
    }
    store_elements(op.output, row, sample, plane * shape.n_features + feature, output);
  }
}

template <typename Element, int kDegree, int kWidth, bool kDerivative>
__global__ void __launch_bounds__(kThreads) position_gradient_kernel(const TriplaneTilePositionGradient op, bool row) {
  using Scalar = ScalarOf<Element>;
  constexpr int kCount = (kDegree + 1) * (kDegree + 1);
  const Triplanes& shape = op.tile.shape;
  const uint32_t n_samples = live_samples(op.tile.count, shape.n_samples);
  const uint32_t sample = blockIdx.x * kThreads + threadIdx.x;
  if (sample >= n_samples) return;

  Scalar position[3], direction[3] = {}, sum[3] = {};
  load_vector(op.tile.positions, sample, position);
  if (kDerivative) load_vector(op.direction, sample, direction);
  const int32_t scene = scene_of(shape, sample);
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane) {
    const int64_t offset = triplane_offset(shape, scene, plane);
    if (offset < 0) continue;
    const TriplaneCell<kDegree, Scalar> cell = triplane_cell<kDegree>(shape, plane, position);
    const VertexRows<Element, kDegree, kWidth> vertices(shape, op.planes, offset, cell);
    Scalar values[kCount] = {};
#pragma unroll 1
    for (int feature = 0; feature < shape.n_features; feature += kWidth) {
      Row<Element, kWidth> rows[kCount];
      vertices.load(feature, rows);
      Scalar grad[kWidth];
      load_elements(op.grad_features, row, sample, plane * shape.n_features + feature, grad);
#pragma unroll
      for (int vertex = 0; vertex < kCount; ++vertex) {
#pragma unroll
        for (int f = 0; f < kWidth; ++f) values[vertex] += grad[f] * to_scalar(rows[vertex].values[f]);
      }
    }
    Scalar by_column, by_row;
    triplane_gradient<kDegree, kDerivative>(cell, values, along_columns(plane, direction), along_rows(plane, direction),
                                            &by_column, &by_row);
    sum[triplane_column_axis(plane)] += by_column;
    sum[triplane_row_axis(plane)] += by_row;
  }
  store_vector(op.gradient, sample, sum);
}

unsigned blocks_for(const TriplaneTile& tile) {
  return static_cast<unsigned>((tile.shape.n_samples + kThreads - 1) / kThreads);
}

// Calls start(plane element, degree, features at once, std::bool_constant<whether with a direction>).
template <typename Start>
Status with_planes(ElementType type, const Triplanes& shape, const AnyView& direction, const Start& start) {
  const auto of_element = [&](auto element) {
    with_shape<decltype(element)>(shape, [&](auto degree, auto width) {
      direction.data != nullptr ? start(element, degree, width, std::true_type())
                                : start(element, degree, width, std::false_type());
    });
    return launch_status();
  };
  switch (type) {
    case ElementType::kFloat16:
      return of_element(__half());
    case ElementType::kFloat32:
      return of_element(float());
    case ElementType::kFloat64:
      return of_element(double());
    default:
      return "planes are float16, float32 or float64";
  }
}

}  // namespace

Status triplane_tile_encode(const TriplaneTileEncode& op, const Launch& launch) {
  if (const Status status = tile_status(op.tile)) return status;
  if (op.tile.shape.n_samples <= 0) return nullptr;
  const dim3 blocks(blocks_for(op.tile), kPlanes);
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  return with_planes(op.planes_type, op.tile.shape, op.direction,
                     [&](auto element, auto degree, auto width, auto derivative) {
                       constexpr int kWidth = decltype(width)::value;
                       const bool row = has_rows(op.output, kWidth);
                       encode_kernel<decltype(element), decltype(degree)::value, kWidth, decltype(derivative)::value>
                           <<<blocks, kThreads, 0, stream>>>(op, row);
                     });
}

Status triplane_tile_position_gradient(const TriplaneTilePositionGradient& op, const Launch& launch) {
  if (const Status status = tile_status(op.tile)) return status;
  if (op.tile.shape.n_samples <= 0) return nullptr;
  const unsigned blocks = blocks_for(op.tile);
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  return with_planes(
      op.planes_type, op.tile.shape, op.direction, [&](auto element, auto degree, auto width, auto derivative) {
        constexpr int kWidth = decltype(width)::value;
        const bool row = has_rows(op.grad_features, kWidth);
        position_gradient_kernel<decltype(element), decltype(degree)::value, kWidth, decltype(derivative)::value>
            <<<blocks, kThreads, 0, stream>>>(op, row);
      });
}

}  // namespace dff::cuda
