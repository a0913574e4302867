#pragma once

#include "bindings/bind.h"
#include "dreamfusion_fast/triplane.h"

namespace dff::bindings {

template <>
struct FromPython<Triplanes>
    : FromTuple<Triplanes, &Triplanes::scenes, &Triplanes::n_scenes, &Triplanes::n_samples, &Triplanes::height,
                &Triplanes::width, &Triplanes::n_features, &Triplanes::degree> {};

template <typename T>
void bind_triplane(py::module_& module) {
  using Encode = TriplaneEncode<T>;
  def(module, "triplane_encode" + kSuffix<T>, &backend::triplane_encode<T>, &Encode::shape, &Encode::direction,
      &Encode::positions, &Encode::planes, &Encode::output);

  using ToPlanes = TriplanePlanesGradient<T>;
  def(module, "triplane_planes_gradient" + kSuffix<T>, &backend::triplane_planes_gradient<T>, &ToPlanes::shape,
      &ToPlanes::direction, &ToPlanes::grad_output, &ToPlanes::positions, &ToPlanes::grad_planes);

  using ToPosition = TriplanePositionGradient<T>;
  def(module, "triplane_position_gradient" + kSuffix<T>, &backend::triplane_position_gradient<T>, &ToPosition::shape,
      &ToPosition::direction, &ToPosition::grad_output, &ToPosition::positions, &ToPosition::planes,
      &ToPosition::gradient);
}

}  // namespace dff::bindings
