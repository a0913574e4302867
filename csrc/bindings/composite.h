#pragma once

#include "bindings/bind.h"
#include "dreamfusion_fast/composite.h"

namespace dff {
namespace bindings {

template <typename T>
void composite_forward(Address density, Address values, Address t, Address lengths, double step, Address offsets,
                       Address weights, Address opacity, Address depth, Address accumulated, int64_t n_rays,
                       int64_t n_samples, int64_t n_channels, std::uintptr_t where) {
  CompositeForward<T> op;
  op.density = pointer<const T>(density);
  op.values = pointer<const T>(values);
  op.t = pointer<const T>(t);
  op.offsets = pointer<const int32_t>(offsets);
  op.weights = pointer<T>(weights);
  op.opacity = pointer<T>(opacity);
  op.depth = pointer<T>(depth);
  op.accumulated = pointer<T>(accumulated);
  op.n_rays = n_rays;
  op.n_samples = n_samples;
  op.n_channels = n_channels;
  op.lengths = pointer<const T>(lengths);
  op.step = static_cast<T>(step);
  check("composite", backend::composite_forward(op, launch_at(where)));
}

template <typename T>
void composite_backward(Address density, Address values, Address t, Address lengths, double step, Address offsets,
                        Address weights, Address grad_weights, Address grad_opacity, Address grad_depth,
                        Address grad_accumulated, Address grad_density, Address grad_values, int64_t n_rays,
                        int64_t n_samples, int64_t n_channels, std::uintptr_t where) {
  CompositeBackward<T> op;
  op.density = pointer<const T>(density);
  op.values = pointer<const T>(values);
  op.t = pointer<const T>(t);
  op.offsets = pointer<const int32_t>(offsets);
  op.weights = pointer<const T>(weights);
  op.grad_weights = pointer<const T>(grad_weights);
  op.grad_opacity = pointer<const T>(grad_opacity);
  op.grad_depth = pointer<const T>(grad_depth);
  op.grad_accumulated = pointer<const T>(grad_accumulated);
  op.grad_density = pointer<T>(grad_density);
  op.grad_values = pointer<T>(grad_values);
  op.n_rays = n_rays;
  op.n_samples = n_samples;
  op.n_channels = n_channels;
  op.lengths = pointer<const T>(lengths);
  op.step = static_cast<T>(step);
  check("composite", backend::composite_backward(op, launch_at(where)));
}

inline void bind_composite(py::module_& module) {
  DFF_DEF(module, "composite_forward", composite_forward);
  DFF_DEF(module, "composite_backward", composite_backward);
}

}  // namespace bindings
}  // namespace dff
