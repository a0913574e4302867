#pragma once

#include "bindings/bind.h"
#include "dreamfusion_fast/hash_grid.h"

namespace dff {
namespace bindings {

inline HashGridLevels hash_grid_levels(Address level_offsets, Address resolutions, int64_t n_rows, int64_t n_samples,
                                       int32_t n_levels, int32_t n_features, bool smoothstep) {
  HashGridLevels levels;
  levels.level_offsets = pointer<const int64_t>(level_offsets);
  levels.resolutions = pointer<const int32_t>(resolutions);
  levels.n_rows = n_rows;
  levels.n_samples = n_samples;
  levels.n_levels = n_levels;
  levels.n_features = n_features;
  levels.smoothstep = smoothstep;
  return levels;
}

template <typename T>
void hash_grid_forward(Address positions, Address table, Address output, Address level_offsets, Address resolutions,
                       int64_t n_rows, int64_t n_samples, int32_t n_levels, int32_t n_features, bool smoothstep,
                       std::uintptr_t where) {
  HashGridForward<T> op;
  op.levels = hash_grid_levels(level_offsets, resolutions, n_rows, n_samples, n_levels, n_features, smoothstep);
  op.positions = pointer<const T>(positions);
  op.table = pointer<const T>(table);
  op.output = pointer<T>(output);
  check("hash_grid", backend::hash_grid_forward(op, launch_at(where)));
}

template <typename T>
void hash_grid_backward_table(Address grad_output, Address positions, Address grad_table, Address level_offsets,
                              Address resolutions, int64_t n_rows, int64_t n_samples, int32_t n_levels,
                              int32_t n_features, bool smoothstep, std::uintptr_t where) {
  HashGridBackwardTable<T> op;
  op.levels = hash_grid_levels(level_offsets, resolutions, n_rows, n_samples, n_levels, n_features, smoothstep);
  op.grad_output = pointer<const T>(grad_output);
  op.positions = pointer<const T>(positions);
  op.grad_table = pointer<T>(grad_table);
  check("hash_grid", backend::hash_grid_backward_table(op, launch_at(where)));
}

template <typename T>
void hash_grid_backward_positions(Address grad_output, Address positions, Address table, Address grad_positions,
                                  Address level_offsets, Address resolutions, int64_t n_rows, int64_t n_samples,
                                  int32_t n_levels, int32_t n_features, bool smoothstep, std::uintptr_t where) {
  HashGridBackwardPositions<T> op;
  op.levels = hash_grid_levels(level_offsets, resolutions, n_rows, n_samples, n_levels, n_features, smoothstep);
  op.grad_output = pointer<const T>(grad_output);
  op.positions = pointer<const T>(positions);
  op.table = pointer<const T>(table);
  op.grad_positions = pointer<T>(grad_positions);
  check("hash_grid", backend::hash_grid_backward_positions(op, launch_at(where)));
}

template <typename T>
void hash_grid_backward_backward(Address direction, Address grad_output, Address positions, Address table,
                                 Address grad_grad_output, Address grad_table, Address grad_positions,
                                 Address level_offsets, Address resolutions, int64_t n_rows, int64_t n_samples,
                                 int32_t n_levels, int32_t n_features, bool smoothstep, std::uintptr_t where) {
  HashGridBackwardBackward<T> op;
  op.levels = hash_grid_levels(level_offsets, resolutions, n_rows, n_samples, n_levels, n_features, smoothstep);
  op.direction = pointer<const T>(direction);
  op.grad_output = pointer<const T>(grad_output);
  op.positions = pointer<const T>(positions);
  op.table = pointer<const T>(table);
  op.grad_grad_output = pointer<T>(grad_grad_output);
  op.grad_table = pointer<T>(grad_table);
  op.grad_positions = pointer<T>(grad_positions);
  check("hash_grid", backend::hash_grid_backward_backward(op, launch_at(where)));
}

inline void bind_hash_grid(py::module_& module) {
  DFF_DEF(module, "hash_grid_forward", hash_grid_forward);
  DFF_DEF(module, "hash_grid_backward_table", hash_grid_backward_table);
  DFF_DEF(module, "hash_grid_backward_positions", hash_grid_backward_positions);
  DFF_DEF(module, "hash_grid_backward_backward", hash_grid_backward_backward);
}

}  // namespace bindings
}  // namespace dff
