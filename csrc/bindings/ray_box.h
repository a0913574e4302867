#pragma once

#include "bindings/bind.h"
#include "dreamfusion_fast/ray_box.h"

namespace dff {
namespace bindings {

template <typename T>
void ray_box(Address origins, Address directions, Address aabb, double t_min, double t_max, Address t_near,
             Address t_far, int64_t n_rays, std::uintptr_t where) {
  RayBox<T> op;
  op.origins = pointer<const T>(origins);
  op.directions = pointer<const T>(directions);
  op.aabb = pointer<const T>(aabb);
  op.t_min = static_cast<T>(t_min);
  op.t_max = static_cast<T>(t_max);
  op.t_near = pointer<T>(t_near);
  op.t_far = pointer<T>(t_far);
  op.n_rays = n_rays;
  check("ray_box", backend::ray_box(op, launch_at(where)));
}

inline void bind_ray_box(py::module_& module) { DFF_DEF(module, "ray_box", ray_box); }

}  // namespace bindings
}  // namespace dff
