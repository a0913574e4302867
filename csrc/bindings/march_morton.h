#pragma once

#include "bindings/bind.h"
#include "dreamfusion_fast/march_morton.h"

namespace dff::bindings {

template <typename T>
using MortonMembers =
    FromTuple<MortonRays<T>, &MortonRays<T>::origins, &MortonRays<T>::directions, &MortonRays<T>::t_near,
              &MortonRays<T>::t_far, &MortonRays<T>::noise, &MortonRays<T>::bitfield, &MortonRays<T>::resolution,
              &MortonRays<T>::cascades, &MortonRays<T>::bound, &MortonRays<T>::cone_angle, &MortonRays<T>::min_step,
              &MortonRays<T>::max_step, &MortonRays<T>::limit, &MortonRays<T>::contract, &MortonRays<T>::n_rays>;

template <typename T>
struct FromPython<MortonRays<T>> : MortonMembers<T> {};

template <typename T>
void bind_march_morton(py::module_& module) {
  using Count = MortonCount<T>;
  def(module, "morton_count" + kSuffix<T>, &backend::morton_count<T>, &Count::rays, &Count::counts);

  using Write = MortonWrite<T>;
  def(module, "morton_write" + kSuffix<T>, &backend::morton_write<T>, &Write::rays, &Write::offsets, &Write::positions,
      &Write::spans, &Write::ray_indices);
}

}  // namespace dff::bindings
