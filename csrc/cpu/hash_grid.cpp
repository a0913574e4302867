#include "dreamfusion_fast/hash_grid.h"

#include <algorithm>
#include <type_traits>

#include "parallel.h"

namespace dff::cpu {

namespace {

// Every pass takes samples in blocks and does each level of a block in two loops: one that the compiler vectorises
// (cells, rows, weights: pure arithmetic, into the arrays below, which stay in L1), and one that reads or adds to the
// table, a sample at a time, where vector gathers would gain nothing.
constexpr int kBlock = 128;
constexpr int64_t kSamplesPerPiece = 8 * kBlock;  // some 16 levels x 10 ns each: 100 us

template <typename Scalar>
struct alignas(64) Block {
  int64_t first;  // sample
  int count;      // of samples; the arrays below are filled up to kBlock, so that the vector loops have a fixed length
  Scalar position[3][kBlock];
  Scalar direction[3][kBlock];
  Scalar gradient[3][kBlock];
  uint32_t rows[kCorners][kBlock];
  Scalar weights[kCorners][kBlock];  // of the corners; or their values, in the passes that need those
};

template <typename Scalar>
void load_vectors(const Scalar* vectors, int64_t first, int count, Scalar (&out)[3][kBlock]) {
  for (int i = 0; i < count; ++i) {
    for (int axis = 0; axis < 3; ++axis) out[axis][i] = vectors[3 * (first + i) + axis];
  }
  for (int axis = 0; axis < 3; ++axis) std::fill(out[axis] + count, out[axis] + kBlock, Scalar(0));
}

// Calls body(block) for the blocks of samples [begin, end), with their positions loaded.
template <typename Scalar, typename Body>
void for_each_block(const Scalar* positions, int64_t begin, int64_t end, const Body& body) {
  Block<Scalar> block;
  for (int64_t first = begin; first < end; first += kBlock) {
    block.first = first;
    block.count = static_cast<int>(std::min<int64_t>(kBlock, end - first));
    load_vectors(positions, first, block.count, block.position);
    body(block);
  }
}

template <bool kSmoothstep, typename Level, typename Scalar>
DFF_HD void axes_of(const Block<Scalar>& block, const Level& level, int i, HashGridAxis<Scalar> (&axes)[3]) {
  const Scalar position[3] = {block.position[0][i], block.position[1][i], block.position[2][i]};
  hash_grid_axes<kSmoothstep>(level, position, axes);
}

template <typename Level>
Level level_at(const HashGridLevels& levels, int index) {
  if constexpr (std::is_same_v<Level, HashGridPlacedLevel>) {
    return hash_grid_placed_level(levels, index);
  } else {
    return hash_grid_level(levels, index);
  }
}

enum class Stage { kRows, kRowsAndWeights, kRowsAndDerivatives };

template <Stage kStage, bool kSmoothstep, RowKind kKind, typename Level, typename Scalar>
void stage_as(const Level& level_in, Block<Scalar>& block) {
  const Level level = level_in;  // a copy that no store below can alias
  for (int i = 0; i < kBlock; ++i) {
    HashGridAxis<Scalar> axes[3];
    axes_of<kSmoothstep>(block, level, i, axes);
    uint32_t rows[kCorners];
    if constexpr (std::is_same_v<Level, HashGridPlacedLevel>) {
      hash_grid_rows(level, axes, rows);
    } else {
      hash_grid_rows<kKind>(level, axes, rows);
    }
    DFF_UNROLL
    for (int corner = 0; corner < kCorners; ++corner) block.rows[corner][i] = rows[corner];
    if (kStage == Stage::kRows) continue;
    Scalar weights[kCorners];
    if (kStage == Stage::kRowsAndWeights) {
      hash_grid_weights(axes, weights);
    } else {
      const Scalar direction[3] = {block.direction[0][i], block.direction[1][i], block.direction[2][i]};
      hash_grid_weight_derivatives(axes, direction, weights);
    }
    DFF_UNROLL
    for (int corner = 0; corner < kCorners; ++corner) block.weights[corner][i] = weights[corner];
  }
}

// Fills block.rows and, depending on the stage, block.weights.
template <Stage kStage, typename Scalar>
void stage(const HashGridLevel& level, bool smoothstep, Block<Scalar>& block) {
  const auto run = [&](auto smooth) {
    constexpr bool kSmooth = decltype(smooth)::value;
    switch (level.kind) {
      case RowKind::kDense:
        return stage_as<kStage, kSmooth, RowKind::kDense>(level, block);
      case RowKind::kHashedMask:
        return stage_as<kStage, kSmooth, RowKind::kHashedMask>(level, block);
      case RowKind::kHashedModulo:
        return stage_as<kStage, kSmooth, RowKind::kHashedModulo>(level, block);
    }
  };
  smoothstep ? run(std::true_type()) : run(std::false_type());
}

template <Stage kStage, typename Scalar>
void stage(const HashGridPlacedLevel& level, bool smoothstep, Block<Scalar>& block) {
  smoothstep ? stage_as<kStage, true, RowKind::kDense>(level, block)
             : stage_as<kStage, false, RowKind::kDense>(level, block);
}

// Fills block.rows, and block.weights for the encoding or, with a direction, for its directional derivative.
template <typename Level, typename Scalar>
void stage_weights(const Level& level, bool smoothstep, bool derivative, Block<Scalar>& block) {
  derivative ? stage<Stage::kRowsAndDerivatives>(level, smoothstep, block)
             : stage<Stage::kRowsAndWeights>(level, smoothstep, block);
}

// A level beyond this size does not stay in L2: fetching the rows a dozen samples ahead then saves a quarter to a third
// of the time (16 levels of 2^19 rows, Zen 4), while below it costs a tenth.
constexpr int64_t kPrefetchBytes = 1 << 20;
constexpr int kAhead = 12;

// Calls run(std::integral_constant<int, n_features>, std::bool_constant<whether to prefetch>).
template <typename Scalar, typename Run>
void with_features(int n_features, const HashGridLevel& level, const Run& run) {
  const auto run_for = [&](auto features) {
    const int64_t bytes = static_cast<int64_t>(level.rows) * decltype(features)::value * sizeof(Scalar);
    bytes > kPrefetchBytes ? run(features, std::true_type()) : run(features, std::false_type());
  };
  switch (n_features) {
    case 1:
      return run_for(std::integral_constant<int, 1>());
    case 2:
      return run_for(std::integral_constant<int, 2>());
    case 4:
      return run_for(std::integral_constant<int, 4>());
    default:
      return run_for(std::integral_constant<int, 8>());
  }
}

// Asks for the rows of sample i + kAhead of the block (of its first ones at its end, at no harm).
template <int kFeatures, typename Scalar>
DFF_HD void prefetch_rows(const Block<Scalar>& block, int i, const Scalar* table) {
#if defined(__GNUC__)
  DFF_UNROLL
  for (int corner = 0; corner < kCorners; ++corner) {
    __builtin_prefetch(table + static_cast<int64_t>(block.rows[corner][(i + kAhead) % kBlock]) * kFeatures);
  }
#endif
}

// output [count, stride]: the weighted sum of the corners' rows.
template <int kFeatures, bool kPrefetch, typename Scalar>
void interpolate(const Block<Scalar>& block, const Scalar* table, Scalar* output, int64_t stride) {
  for (int i = 0; i < block.count; ++i) {
    if (kPrefetch) prefetch_rows<kFeatures>(block, i, table);
    Scalar sums[kFeatures] = {};
    DFF_UNROLL
    for (int corner = 0; corner < kCorners; ++corner) {
      const Scalar* row = table + static_cast<int64_t>(block.rows[corner][i]) * kFeatures;
      for (int f = 0; f < kFeatures; ++f) sums[f] += block.weights[corner][i] * row[f];
    }
    for (int f = 0; f < kFeatures; ++f) output[i * stride + f] = sums[f];
  }
}

// block.weights = the corners' values, each row's product with the sample's grad_output [count, stride].
template <int kFeatures, bool kPrefetch, typename Scalar>
void corner_values(Block<Scalar>& block, const Scalar* table, const Scalar* grad_output, int64_t stride) {
  for (int i = 0; i < block.count; ++i) {
    if (kPrefetch) prefetch_rows<kFeatures>(block, i, table);
    Scalar grad[kFeatures];
    for (int f = 0; f < kFeatures; ++f) grad[f] = grad_output[i * stride + f];
    DFF_UNROLL
    for (int corner = 0; corner < kCorners; ++corner) {
      const Scalar* row = table + static_cast<int64_t>(block.rows[corner][i]) * kFeatures;
      Scalar value = 0;
      for (int f = 0; f < kFeatures; ++f) value += grad[f] * row[f];
      block.weights[corner][i] = value;
    }
  }
}

// The rows of one level that one thread alone writes to.
struct RowRange {
  uint32_t begin;
  uint32_t size;
  bool whole;  // all rows of the level: no need to look
};

template <int kFeatures, bool kPrefetch, typename Scalar>
void scatter(const Block<Scalar>& block, const RowRange& owned, Scalar* grad_table, const Scalar* grad_output,
             int64_t stride) {
  for (int i = 0; i < block.count; ++i) {
    if (kPrefetch) prefetch_rows<kFeatures>(block, i, grad_table);
    Scalar grad[kFeatures];
    for (int f = 0; f < kFeatures; ++f) grad[f] = grad_output[i * stride + f];
    DFF_UNROLL
    for (int corner = 0; corner < kCorners; ++corner) {
      const uint32_t index = block.rows[corner][i];
      if (!owned.whole && index - owned.begin >= owned.size) continue;
      Scalar* row = grad_table + static_cast<int64_t>(index) * kFeatures;
      for (int f = 0; f < kFeatures; ++f) row[f] += block.weights[corner][i] * grad[f];
    }
  }
}

// Adds the gradient of sum_c W_c v_c, or its Hessian times the direction, to block.gradient.
template <bool kSecond, bool kSmoothstep, typename Level, typename Scalar>
void add_gradient_as(const Level& level_in, Block<Scalar>& block) {
  const Level level = level_in;
  for (int i = 0; i < kBlock; ++i) {
    HashGridAxis<Scalar> axes[3];
    axes_of<kSmoothstep>(block, level, i, axes);
    Scalar values[kCorners];
    DFF_UNROLL
    for (int corner = 0; corner < kCorners; ++corner) values[corner] = block.weights[corner][i];
    Scalar gradient[3];
    if (kSecond) {
      const Scalar direction[3] = {block.direction[0][i], block.direction[1][i], block.direction[2][i]};
      hash_grid_hessian_product(axes, values, direction, gradient);
    } else {
      hash_grid_gradient(axes, values, gradient);
    }
    block.gradient[0][i] += gradient[0];
    block.gradient[1][i] += gradient[1];
    block.gradient[2][i] += gradient[2];
  }
}

template <bool kSecond, typename Level, typename Scalar>
void add_gradient(const Level& level, bool smoothstep, Block<Scalar>& block) {
  smoothstep ? add_gradient_as<kSecond, true>(level, block) : add_gradient_as<kSecond, false>(level, block);
}

template <typename Scalar>
void clear_gradient(Block<Scalar>& block) {
  for (int axis = 0; axis < 3; ++axis) std::fill(block.gradient[axis], block.gradient[axis] + kBlock, Scalar(0));
}

template <typename Scalar>
void store_gradient(const Block<Scalar>& block, Scalar* out) {
  for (int i = 0; i < block.count; ++i) {
    for (int axis = 0; axis < 3; ++axis) out[3 * (block.first + i) + axis] = block.gradient[axis][i];
  }
}

// The ops check it with a better message; this keeps a caller from elsewhere out of foreign memory.
Status levels_status(const HashGridLevels& levels) {
  for (int index = 0; index < levels.n_levels; ++index) {
    if (hash_grid_level(levels, index).rows == 0) return "a level does not lie inside the table";
  }
  return nullptr;
}

template <typename Level, bool kSecond, typename Scalar>
Status position_gradient(const HashGridPositionGradient<Scalar>& op, const Launch& launch) {
  const HashGridLevels& levels = op.levels;
  const int64_t stride = static_cast<int64_t>(levels.n_levels) * levels.n_features;
  parallel_ranges(levels.n_samples, launch.threads, kSamplesPerPiece, [&](int64_t begin, int64_t end) {
    for_each_block(op.positions, begin, end, [&](Block<Scalar>& block) {
      if (kSecond) load_vectors(op.direction, block.first, block.count, block.direction);
      clear_gradient(block);
      for (int index = 0; index < levels.n_levels; ++index) {
        const Level level = level_at<Level>(levels, index);
        stage<Stage::kRows>(level, levels.smoothstep, block);
        with_features<Scalar>(levels.n_features, level, [&](auto features, auto prefetch) {
          constexpr int kFeatures = decltype(features)::value;
          constexpr bool kPrefetch = decltype(prefetch)::value;
          corner_values<kFeatures, kPrefetch>(block, op.table + level.first_row * kFeatures,
                                              op.grad_output + block.first * stride + index * kFeatures, stride);
        });
        add_gradient<kSecond>(level, levels.smoothstep, block);
      }
      store_gradient(block, op.gradient);
    });
  });
  return nullptr;
}

template <typename Level, typename Scalar>
Status encode(const HashGridEncode<Scalar>& op, const Launch& launch) {
  const HashGridLevels& levels = op.levels;
  const int64_t stride = static_cast<int64_t>(levels.n_levels) * levels.n_features;
  parallel_ranges(levels.n_samples, launch.threads, kSamplesPerPiece, [&](int64_t begin, int64_t end) {
    for_each_block(op.positions, begin, end, [&](Block<Scalar>& block) {
      if (op.direction != nullptr) load_vectors(op.direction, block.first, block.count, block.direction);
      for (int index = 0; index < levels.n_levels; ++index) {
        const Level level = level_at<Level>(levels, index);
        stage_weights(level, levels.smoothstep, op.direction != nullptr, block);
        with_features<Scalar>(levels.n_features, level, [&](auto features, auto prefetch) {
          constexpr int kFeatures = decltype(features)::value;
          constexpr bool kPrefetch = decltype(prefetch)::value;
          interpolate<kFeatures, kPrefetch>(block, op.table + level.first_row * kFeatures,
                                            op.output + block.first * stride + index * kFeatures, stride);
        });
      }
    });
  });
  return nullptr;
}

// No atomics and no copies of the table: a thread owns levels, or, with more threads than levels, parts of the rows of
// a level, and goes through all samples. So each row receives its terms in the order of the samples, and the sum does
// not depend on the number of threads. A thread takes its levels block by block, because the gradients of two
// neighbouring levels of a sample share a cache line.
template <typename Level, typename Scalar>
Status table_gradient(const HashGridTableGradient<Scalar>& op, const Launch& launch) {
  const HashGridLevels& levels = op.levels;
  const int64_t stride = static_cast<int64_t>(levels.n_levels) * levels.n_features;
  const int threads = std::max(launch.threads, 1);
  const int parts = (threads + levels.n_levels - 1) / levels.n_levels;
  const int shares = levels.n_levels * parts;  // share s: level s % n_levels, part s / n_levels of its rows
  const int owners = std::min(threads, shares);
  const auto own = [&](int64_t owner) {
    for_each_block(op.positions, 0, levels.n_samples, [&](Block<Scalar>& block) {
      if (op.direction != nullptr) load_vectors(op.direction, block.first, block.count, block.direction);
      for (int share = static_cast<int>(owner); share < shares; share += owners) {
        const int index = share % levels.n_levels;
        const Level level = level_at<Level>(levels, index);
        const uint32_t part_rows = (level.rows + parts - 1) / parts;
        const RowRange owned = {static_cast<uint32_t>(share / levels.n_levels) * part_rows, part_rows, parts == 1};
        stage_weights(level, levels.smoothstep, op.direction != nullptr, block);
        with_features<Scalar>(levels.n_features, level, [&](auto features, auto prefetch) {
          constexpr int kFeatures = decltype(features)::value;
          constexpr bool kPrefetch = decltype(prefetch)::value;
          scatter<kFeatures, kPrefetch>(block, owned, op.grad_table + level.first_row * kFeatures,
                                        op.grad_output + block.first * stride + index * kFeatures, stride);
        });
      }
    });
  };
  return for_each(owners, launch, own, 1);
}

}  // namespace

template <typename Scalar>
Status hash_grid_encode(const HashGridEncode<Scalar>& op, const Launch& launch) {
  if (const Status status = levels_status(op.levels)) return status;
  return op.levels.placements == nullptr ? encode<HashGridLevel>(op, launch) : encode<HashGridPlacedLevel>(op, launch);
}

template <typename Scalar>
Status hash_grid_table_gradient(const HashGridTableGradient<Scalar>& op, const Launch& launch) {
  if (const Status status = levels_status(op.levels)) return status;
  return op.levels.placements == nullptr ? table_gradient<HashGridLevel>(op, launch)
                                         : table_gradient<HashGridPlacedLevel>(op, launch);
}

template <typename Scalar>
Status hash_grid_position_gradient(const HashGridPositionGradient<Scalar>& op, const Launch& launch) {
  if (const Status status = levels_status(op.levels)) return status;
  const auto run = [&](auto second) {
    constexpr bool kSecond = decltype(second)::value;
    return op.levels.placements == nullptr ? position_gradient<HashGridLevel, kSecond>(op, launch)
                                           : position_gradient<HashGridPlacedLevel, kSecond>(op, launch);
  };
  return op.direction != nullptr ? run(std::true_type()) : run(std::false_type());
}

DFF_FOR_FLOATS(hash_grid_encode, HashGridEncode);
DFF_FOR_FLOATS(hash_grid_table_gradient, HashGridTableGradient);
DFF_FOR_FLOATS(hash_grid_position_gradient, HashGridPositionGradient);

}  // namespace dff::cpu
