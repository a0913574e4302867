#include <limits>
#include <type_traits>

#include "dreamfusion_fast/hash_grid.h"
#include "parallel.cuh"

namespace dff {
namespace cuda {

namespace {

// One thread per sample and level. The level is blockIdx.y, and blocks start in the order of blockIdx.x first: so the
// GPU works on one level at a time, whose table (4 MB at 2^19 rows x 2 float32) then stays in L2, where all levels
// would not fit.
constexpr int kThreads = 256;

template <typename Scalar, int kFeatures>
struct alignas(sizeof(Scalar) * kFeatures < 16 ? sizeof(Scalar) * kFeatures : 16) Row {
  Scalar values[kFeatures];
};

// In as few loads as the alignment allows; the ops see to it that rows are aligned to their size or 16 bytes.
template <int kFeatures, typename Scalar>
__device__ Row<Scalar, kFeatures> load_row(const Scalar* from) {
  return *reinterpret_cast<const Row<Scalar, kFeatures>*>(from);
}

template <int kFeatures, typename Scalar>
__device__ void store_row(Scalar* to, const Row<Scalar, kFeatures>& row) {
  *reinterpret_cast<Row<Scalar, kFeatures>*>(to) = row;
}

// How many elements one atomic transaction takes.
template <int kFeatures, typename Scalar>
constexpr int atomic_width() {
#if __CUDA_ARCH__ >= 900
  return std::is_same_v<Scalar, float> ? (kFeatures < 4 ? kFeatures : 4) : 1;
#else
  return 1;
#endif
}

template <int kFeatures, typename Scalar>
__device__ void atomic_add_row(Scalar* to, const Row<Scalar, kFeatures>& row) {
  constexpr int kWidth = atomic_width<kFeatures, Scalar>();
#pragma unroll
  for (int f = 0; f < kFeatures; f += kWidth) {
    const Scalar* from = row.values + f;
    if constexpr (kWidth == 4) {
      atomicAdd(reinterpret_cast<float4*>(to + f), make_float4(from[0], from[1], from[2], from[3]));
    } else if constexpr (kWidth == 2) {
      atomicAdd(reinterpret_cast<float2*>(to + f), make_float2(from[0], from[1]));
    } else {
      atomicAdd(to + f, *from);
    }
  }
}

template <typename Scalar>
__device__ void load_vector(const Scalar* vectors, int64_t sample, Scalar (&vector)[3]) {
  vector[0] = vectors[3 * sample];
  vector[1] = vectors[3 * sample + 1];
  vector[2] = vectors[3 * sample + 2];
}

// What every kernel starts from: this thread's sample and level, its cell and the rows of its corners.
template <typename Scalar>
struct Cell {
  int64_t sample;
  int64_t column;  // of this level, in units of rows of n_features: index into [n_samples, n_levels]
  HashGridLevel level;
  HashGridAxis<Scalar> axes[3];
  uint32_t rows[kCorners];
  bool active;  // false: no sample for this thread, or a level outside the table
  bool broken;  // a level outside the table

  __device__ Cell(const HashGridLevels& levels, const Scalar* positions) {
    sample = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int index = static_cast<int>(blockIdx.y);
    column = sample * levels.n_levels + index;
    level = hash_grid_level(levels, index);
    active = sample < levels.n_samples;
    broken = level.rows == 0;
    if (!active || broken) return;
    Scalar position[3];
    load_vector(positions, sample, position);
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      axes[axis] = levels.smoothstep ? hash_grid_axis<true>(position[axis], level.resolution)
                                     : hash_grid_axis<false>(position[axis], level.resolution);
    }
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

  template <int kFeatures, typename Element>
  __device__ Element* corner(Element* table, int index) const {
    return table + (level.first_row + rows[index]) * kFeatures;
  }

  template <int kFeatures>
  __device__ Row<Scalar, kFeatures> weighted_sum(const Scalar* table, const Scalar (&weights)[kCorners]) const {
    Row<Scalar, kFeatures> sum = {};
#pragma unroll
    for (int i = 0; i < kCorners; ++i) {
      const Row<Scalar, kFeatures> row = load_row<kFeatures>(corner<kFeatures>(table, i));
#pragma unroll
      for (int f = 0; f < kFeatures; ++f) sum.values[f] += weights[i] * row.values[f];
    }
    return sum;
  }

  template <int kFeatures>
  __device__ void corner_values(const Scalar* table, const Row<Scalar, kFeatures>& grad,
                                Scalar (&values)[kCorners]) const {
#pragma unroll
    for (int i = 0; i < kCorners; ++i) {
      const Row<Scalar, kFeatures> row = load_row<kFeatures>(corner<kFeatures>(table, i));
      values[i] = Scalar(0);
#pragma unroll
      for (int f = 0; f < kFeatures; ++f) values[i] += grad.values[f] * row.values[f];
    }
  }

  template <int kFeatures>
  __device__ void scatter(Scalar* grad_table, const Row<Scalar, kFeatures>& grad,
                          const Scalar (&weights)[kCorners]) const {
#pragma unroll
    for (int i = 0; i < kCorners; ++i) {
      Row<Scalar, kFeatures> scaled;
#pragma unroll
      for (int f = 0; f < kFeatures; ++f) scaled.values[f] = weights[i] * grad.values[f];
      atomic_add_row<kFeatures>(corner<kFeatures>(grad_table, i), scaled);
    }
  }

  // The levels of a sample add up in memory: a thread that went through all of them would need all their tables in L2.
  __device__ void add_vector(Scalar* vectors, const Scalar (&vector)[3]) const {
    atomicAdd(vectors + 3 * sample, vector[0]);
    atomicAdd(vectors + 3 * sample + 1, vector[1]);
    atomicAdd(vectors + 3 * sample + 2, vector[2]);
  }
};

template <int kFeatures, typename Scalar>
__global__ void __launch_bounds__(kThreads) forward_kernel(const HashGridForward<Scalar> op) {
  const Cell<Scalar> cell(op.levels, op.positions);
  if (!cell.active) return;
  Row<Scalar, kFeatures> output;
  if (cell.broken) {  // loud, and without waiting: the op can only check this where it does not cost a synchronisation
    for (int f = 0; f < kFeatures; ++f) output.values[f] = std::numeric_limits<Scalar>::quiet_NaN();
  } else {
    Scalar weights[kCorners];
    hash_grid_weights(cell.axes, weights);
    output = cell.template weighted_sum<kFeatures>(op.table, weights);
  }
  store_row<kFeatures>(op.output + cell.column * kFeatures, output);
}

template <int kFeatures, typename Scalar>
__global__ void __launch_bounds__(kThreads) backward_table_kernel(const HashGridBackwardTable<Scalar> op) {
  const Cell<Scalar> cell(op.levels, op.positions);
  if (!cell.active || cell.broken) return;
  Scalar weights[kCorners];
  hash_grid_weights(cell.axes, weights);
  cell.template scatter<kFeatures>(op.grad_table, load_row<kFeatures>(op.grad_output + cell.column * kFeatures),
                                   weights);
}

template <int kFeatures, typename Scalar>
__global__ void __launch_bounds__(kThreads) backward_positions_kernel(const HashGridBackwardPositions<Scalar> op) {
  const Cell<Scalar> cell(op.levels, op.positions);
  if (!cell.active || cell.broken) return;
  Scalar values[kCorners];
  cell.template corner_values<kFeatures>(op.table, load_row<kFeatures>(op.grad_output + cell.column * kFeatures),
                                         values);
  Scalar gradient[3];
  hash_grid_gradient(cell.axes, values, gradient);
  cell.add_vector(op.grad_positions, gradient);
}

template <int kFeatures, typename Scalar>
__global__ void __launch_bounds__(kThreads) backward_backward_kernel(const HashGridBackwardBackward<Scalar> op) {
  const Cell<Scalar> cell(op.levels, op.positions);
  if (!cell.active || cell.broken) return;
  Scalar direction[3];
  load_vector(op.direction, cell.sample, direction);
  if (op.grad_grad_output != nullptr || op.grad_table != nullptr) {
    Scalar weights[kCorners];
    hash_grid_weights_along(cell.axes, direction, weights);
    if (op.grad_grad_output != nullptr) {
      store_row<kFeatures>(op.grad_grad_output + cell.column * kFeatures,
                           cell.template weighted_sum<kFeatures>(op.table, weights));
    }
    if (op.grad_table != nullptr) {
      cell.template scatter<kFeatures>(op.grad_table, load_row<kFeatures>(op.grad_output + cell.column * kFeatures),
                                       weights);
    }
  }
  if (op.grad_positions != nullptr) {
    Scalar values[kCorners];
    cell.template corner_values<kFeatures>(op.table, load_row<kFeatures>(op.grad_output + cell.column * kFeatures),
                                           values);
    Scalar product[3];
    hash_grid_hessian_along(cell.axes, values, direction, product);
    cell.add_vector(op.grad_positions, product);
  }
}

template <typename Scalar>
Status clear_vectors(Scalar* vectors, int64_t count, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(vectors, 0, sizeof(Scalar) * 3 * count, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Calls start(blocks, stream, std::integral_constant<int, n_features>), which launches a kernel.
template <typename Start>
Status for_each_cell(const HashGridLevels& levels, const Launch& launch, const Start& start) {
  const dim3 blocks(static_cast<unsigned>((levels.n_samples + kThreads - 1) / kThreads),
                    static_cast<unsigned>(levels.n_levels));
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  switch (levels.n_features) {
    case 1:
      start(blocks, stream, std::integral_constant<int, 1>());
      break;
    case 2:
      start(blocks, stream, std::integral_constant<int, 2>());
      break;
    case 4:
      start(blocks, stream, std::integral_constant<int, 4>());
      break;
    case 8:
      start(blocks, stream, std::integral_constant<int, 8>());
      break;
    default:
      return "n_features must be 1, 2, 4 or 8";
  }
  return launch_status();
}

}  // namespace

template <typename Scalar>
Status hash_grid_forward(const HashGridForward<Scalar>& op, const Launch& launch) {
  if (op.levels.n_samples <= 0) return nullptr;
  return for_each_cell(op.levels, launch, [&](dim3 blocks, cudaStream_t stream, auto features) {
    forward_kernel<decltype(features)::value><<<blocks, kThreads, 0, stream>>>(op);
  });
}

template <typename Scalar>
Status hash_grid_backward_table(const HashGridBackwardTable<Scalar>& op, const Launch& launch) {
  if (op.levels.n_samples <= 0) return nullptr;
  return for_each_cell(op.levels, launch, [&](dim3 blocks, cudaStream_t stream, auto features) {
    backward_table_kernel<decltype(features)::value><<<blocks, kThreads, 0, stream>>>(op);
  });
}

template <typename Scalar>
Status hash_grid_backward_positions(const HashGridBackwardPositions<Scalar>& op, const Launch& launch) {
  if (op.levels.n_samples <= 0) return nullptr;
  const cudaStream_t clearing = static_cast<cudaStream_t>(launch.stream);
  if (const Status status = clear_vectors(op.grad_positions, op.levels.n_samples, clearing)) return status;
  return for_each_cell(op.levels, launch, [&](dim3 blocks, cudaStream_t stream, auto features) {
    backward_positions_kernel<decltype(features)::value><<<blocks, kThreads, 0, stream>>>(op);
  });
}

template <typename Scalar>
Status hash_grid_backward_backward(const HashGridBackwardBackward<Scalar>& op, const Launch& launch) {
  if (op.levels.n_samples <= 0) return nullptr;
  if (op.grad_positions != nullptr) {
    const cudaStream_t clearing = static_cast<cudaStream_t>(launch.stream);
    if (const Status status = clear_vectors(op.grad_positions, op.levels.n_samples, clearing)) return status;
  }
  return for_each_cell(op.levels, launch, [&](dim3 blocks, cudaStream_t stream, auto features) {
    backward_backward_kernel<decltype(features)::value><<<blocks, kThreads, 0, stream>>>(op);
  });
}

template Status hash_grid_forward(const HashGridForward<float>&, const Launch&);
template Status hash_grid_forward(const HashGridForward<double>&, const Launch&);
template Status hash_grid_backward_table(const HashGridBackwardTable<float>&, const Launch&);
template Status hash_grid_backward_table(const HashGridBackwardTable<double>&, const Launch&);
template Status hash_grid_backward_positions(const HashGridBackwardPositions<float>&, const Launch&);
template Status hash_grid_backward_positions(const HashGridBackwardPositions<double>&, const Launch&);
template Status hash_grid_backward_backward(const HashGridBackwardBackward<float>&, const Launch&);
template Status hash_grid_backward_backward(const HashGridBackwardBackward<double>&, const Launch&);

}  // namespace cuda
}  // namespace dff
