// The planes' gradient from a tile, of first and second order at once: what writes to the planes.
#include "scatter.cuh"
#include "triplane_tile.cuh"

namespace dff::cuda {

namespace {

// One thread per run of successive samples, plane (blockIdx.y) and few features (blockIdx.z). Samples lie along rays,
// so that successive ones often share a cell: their contributions are summed in registers, and atomics are spent on a
// cell once.
constexpr int kThreads = 128;

// What successive samples in one cell of one scene add to its vertices.
template <int kDegree, int kWidth, typename Scalar>
struct Run {
  static constexpr int kSide = kDegree + 1;
  int32_t scene = -1, column = 0, row = 0;
  Scalar sums[kSide * kSide][kWidth];

  __device__ __forceinline__ bool has(int32_t of, const TriplaneCell<kDegree, Scalar>& cell) const {
    return scene == of && column == cell.columns.cell && row == cell.rows.cell;
  }

  __device__ __forceinline__ void start(int32_t of, const TriplaneCell<kDegree, Scalar>& cell) {
    scene = of;
    column = cell.columns.cell;
    row = cell.rows.cell;
#pragma unroll
    for (int vertex = 0; vertex < kSide * kSide; ++vertex) {
#pragma unroll
      for (int f = 0; f < kWidth; ++f) sums[vertex][f] = Scalar(0);
    }
  }

  template <typename Weight>
  __device__ __forceinline__ void add(const Weight& weight, const Scalar (&grad)[kWidth]) {
#pragma unroll
    for (int j = 0; j < kSide; ++j) {
#pragma unroll
      for (int i = 0; i < kSide; ++i) {
        const Scalar w = weight(i, j);
#pragma unroll
        for (int f = 0; f < kWidth; ++f) sums[j * kSide + i][f] += w * grad[f];
      }
    }
  }

  __device__ __forceinline__ void flush(const Triplanes& shape, int plane, int feature, Scalar* grad_planes) const {
    const int64_t offset = triplane_offset(shape, scene, plane);
    if (offset < 0) return;  // nothing yet, or a scene that there is not
#pragma unroll
    for (int j = 0; j < kSide; ++j) {
#pragma unroll
      for (int i = 0; i < kSide; ++i) {
        const int64_t texel = static_cast<int64_t>(row + j) * shape.width + column + i;
        atomic_add(grad_planes + offset + texel * shape.n_features + feature, sums[j * kSide + i]);
      }
    }
  }
};

template <typename Scalar, int kDegree, int kWidth>
__global__ void __launch_bounds__(kThreads) scatter_kernel(const TriplaneTileScatter op, bool fours) {
  constexpr int kCount = kChunk<Scalar>;
  const Triplanes& shape = op.tile.shape;
  const int plane = static_cast<int>(blockIdx.y), feature = static_cast<int>(blockIdx.z) * kWidth;
  const uint32_t n_samples = live_samples(op.tile.count, shape.n_samples);
  const uint32_t begin = (blockIdx.x * kThreads + threadIdx.x) * op.samples_per_thread;
  if (begin >= n_samples) return;
  const uint32_t end = min(begin + op.samples_per_thread, n_samples);
  const uint32_t capacity = static_cast<uint32_t>(shape.n_samples);
  Scalar* grad_planes = static_cast<Scalar*>(op.grad_planes);
  const bool has_first = op.grad_features.data != nullptr, has_second = op.grad_derivative.data != nullptr;

  Run<kDegree, kWidth, Scalar> run;
  for (uint32_t first = begin; first < end; first += kCount) {
    const bool wide = fours && first + kCount <= capacity;
    Scalar positions[3][kCount], directions[3][kCount] = {};
    Scalar grads[kWidth][kCount] = {}, second_grads[kWidth][kCount] = {};
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      load_chunk(of_scalar<Scalar>(op.tile.positions), wide, first, end, axis, positions[axis]);
      if (has_second) load_chunk(of_scalar<Scalar>(op.direction), wide, first, end, axis, directions[axis]);
    }
#pragma unroll
    for (int f = 0; f < kWidth; ++f) {
      const uint32_t channel = plane * shape.n_features + feature + f;
      if (has_first) load_chunk(op.grad_features, wide, first, end, channel, grads[f]);
      if (has_second) load_chunk(op.grad_derivative, wide, first, end, channel, second_grads[f]);
    }
#pragma unroll 1
    for (int i = 0; i < kCount; ++i) {
      if (first + i >= end) break;
      Scalar position[3], direction[3], grad[kWidth], second_grad[kWidth];
      take(positions, position);
      take(directions, direction);
      take(grads, grad);
      take(second_grads, second_grad);
      const bool second = any(second_grad) && any(direction);
      if (!second && !any(grad)) continue;  // an empty sample beyond a surface, say: it costs no atomics
      const int32_t scene = scene_of(shape, first + i);
      const TriplaneCell<kDegree, Scalar> cell = triplane_cell<kDegree>(shape, plane, position);
      if (!run.has(scene, cell)) {
        run.flush(shape, plane, feature, grad_planes);
        run.start(scene, cell);
      }
      run.add([&](int i, int j) { return cell.weight(i, j); }, grad);
      if (second) {
        const Scalar along_columns = plane == 2 ? direction[1] : direction[0];
        const Scalar along_rows = plane == 0 ? direction[1] : direction[2];
        run.add([&](int i, int j) { return cell.derivative(i, j, along_columns, along_rows); }, second_grad);
      }
    }
  }
  run.flush(shape, plane, feature, grad_planes);
}

}  // namespace

Status triplane_tile_scatter(const TriplaneTileScatter& op, const Launch& launch) {
  if (const Status status = tile_status(op.tile)) return status;
  if (op.samples_per_thread < 4 || op.samples_per_thread % 4 != 0) {
    return "samples per thread must be a multiple of 4";
  }
  const Triplanes& shape = op.tile.shape;
  if (shape.n_samples <= 0) return nullptr;
  const int64_t per_block = int64_t(kThreads) * op.samples_per_thread;
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  const bool fours = has_fours(op.tile.positions) && has_fours(op.direction) && has_fours(op.grad_features) &&
                     has_fours(op.grad_derivative);
  const auto of_scalar = [&](auto scalar) {
    using Scalar = decltype(scalar);
    with_shape<Scalar>(shape, [&](auto degree, auto width) {
      constexpr int kWidth = decltype(width)::value;
      const dim3 blocks(static_cast<unsigned>((shape.n_samples + per_block - 1) / per_block), kPlanes,
                        static_cast<unsigned>(shape.n_features / kWidth));
      scatter_kernel<Scalar, decltype(degree)::value, kWidth><<<blocks, kThreads, 0, stream>>>(op, fours);
    });
    return launch_status();
  };
  return op.tile.positions.type == ElementType::kFloat64 ? of_scalar(double()) : of_scalar(float());
}

}  // namespace dff::cuda
