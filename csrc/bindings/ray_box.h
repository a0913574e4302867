#pragma once

#include "bindings/bind.h"
#include "dreamfusion_fast/ray_box.h"

namespace dff::bindings {

template <typename T>
void bind_ray_box(py::module_& module) {
  using Op = RayBox<T>;
  def(module, "ray_box" + kSuffix<T>, &backend::ray_box<T>, &Op::origins, &Op::directions, &Op::aabb, &Op::t_min,
      &Op::t_max, &Op::t_near, &Op::t_far, &Op::n_rays);
}

}  // namespace dff::bindings
