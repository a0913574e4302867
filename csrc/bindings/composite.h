#pragma once

#include "bindings/bind.h"
#include "dreamfusion_fast/composite.h"

namespace dff::bindings {

template <typename T>
void bind_composite(py::module_& module) {
  using Forward = CompositeForward<T>;
  def(module, "composite_forward" + kSuffix<T>, &backend::composite_forward<T>, &Forward::density, &Forward::lengths,
      &Forward::step, &Forward::alphas, &Forward::only_weights, &Forward::offsets, &Forward::n_rays,
      &Forward::n_samples, &Forward::values, &Forward::n_channels, &Forward::t, &Forward::weights,
      &Forward::transmittance, &Forward::opacity, &Forward::depth, &Forward::accumulated);

  using Backward = CompositeBackward<T>;
  def(module, "composite_backward" + kSuffix<T>, &backend::composite_backward<T>, &Backward::density,
      &Backward::lengths, &Backward::step, &Backward::alphas, &Backward::only_weights, &Backward::offsets,
      &Backward::n_rays, &Backward::n_samples, &Backward::values, &Backward::n_channels, &Backward::t,
      &Backward::weights, &Backward::transmittance, &Backward::grad_weights, &Backward::grad_transmittance,
      &Backward::grad_opacity, &Backward::grad_depth, &Backward::grad_accumulated, &Backward::grad_density,
      &Backward::grad_values);
}

}  // namespace dff::bindings
