#pragma once

#include "bindings/bind.h"
#include "dreamfusion_fast/traverse.h"

namespace dff::bindings {

template <typename T>
using TraverseMembers =
    FromTuple<TraverseRays<T>, &TraverseRays<T>::origins, &TraverseRays<T>::directions, &TraverseRays<T>::t_near,
              &TraverseRays<T>::t_far, &TraverseRays<T>::levels, &TraverseRays<T>::occupied, &TraverseRays<T>::blocks,
              &TraverseRays<T>::cells, &TraverseRays<T>::n_levels, &TraverseRays<T>::step, &TraverseRays<T>::cone_angle,
              &TraverseRays<T>::max_step, &TraverseRays<T>::limit, &TraverseRays<T>::n_rays>;

template <typename T>
struct FromPython<TraverseRays<T>> : TraverseMembers<T> {};

template <typename T>
void bind_traverse(py::module_& module) {
  using Count = TraverseCount<T>;
  def(module, "traverse_count" + kSuffix<T>, &backend::traverse_count<T>, &Count::rays, &Count::counts, &Count::firsts,
      &Count::ends);

  using Write = TraverseWrite<T>;
  def(module, "traverse_write" + kSuffix<T>, &backend::traverse_write<T>, &Write::rays, &Write::firsts, &Write::offsets,
      &Write::t_starts, &Write::t_ends, &Write::ray_indices);
}

// What reads no rays.
inline void bind_traverse_grid(py::module_& module) {
  using Blocks = TraverseBlocks;
  def(module, "traverse_blocks", &backend::traverse_blocks, &Blocks::occupied, &Blocks::cells, &Blocks::n_levels,
      &Blocks::blocks);
}

}  // namespace dff::bindings
