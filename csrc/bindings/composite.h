#pragma once

#include "bindings/bind.h"
#include "dreamfusion_fast/composite.h"

namespace dff::bindings {

template <typename T>
void bind_composite(py::module_& module) {
  using Forward = CompositeForward<T>;
  def(module, "composite_forward" + kSuffix<T>, &backend::composite_forward<T>, &Forward::density, &Forward::values,
      &Forward::t, &Forward::lengths, &Forward::step, &Forward::offsets, &Forward::weights, &Forward::opacity,
      &Forward::depth, &Forward::accumulated, &Forward::n_rays, &Forward::n_samples, &Forward::n_channels);

  using Backward = CompositeBackward<T>;
  def(module, "composite_backward" + kSuffix<T>, &backend::composite_backward<T>, &Backward::density, &Backward::values,
      &Backward::t, &Backward::lengths, &Backward::step, &Backward::offsets, &Backward::weights,
      &Backward::grad_weights, &Backward::grad_opacity, &Backward::grad_depth, &Backward::grad_accumulated,
      &Backward::grad_density, &Backward::grad_values, &Backward::n_rays, &Backward::n_samples, &Backward::n_channels);
}

}  // namespace dff::bindings
