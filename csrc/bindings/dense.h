#pragma once

#include "bindings/bind.h"
#include "dreamfusion_fast/dense.h"

namespace dff::bindings {

inline void bind_dense(py::module_& module) {
  module.def("dense_serves", &backend::dense_serves);

  using Linear = DenseLinear;
  def(module, "dense_linear", &backend::dense_linear, &Linear::input, &Linear::weight, &Linear::bias, &Linear::residual,
      &Linear::output, &Linear::rows, &Linear::in, &Linear::out);

  using Conv = DenseConv;
  def(module, "dense_conv", &backend::dense_conv, &Conv::input, &Conv::weight, &Conv::bias, &Conv::residual,
      &Conv::output, &Conv::n, &Conv::height, &Conv::width, &Conv::in, &Conv::out);

  using Norm = DenseGroupNorm;
  def(module, "dense_group_norm", &backend::dense_group_norm, &Norm::input, &Norm::weight, &Norm::bias,
      &Norm::modulation, &Norm::output, &Norm::n, &Norm::pixels, &Norm::channels, &Norm::groups, &Norm::eps,
      &Norm::silu);
}

}  // namespace dff::bindings
