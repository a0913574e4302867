#pragma once

#include "bindings/bind.h"
#include "dreamfusion_fast/dense.h"

namespace dff {
namespace bindings {

inline void dense_linear(Address input, Address weight, Address bias, Address residual, Address output, int64_t rows,
                         int64_t in, int64_t out, std::uintptr_t where) {
  DenseLinear op;
  op.input = pointer<const float>(input);
  op.weight = pointer<const float>(weight);
  op.bias = pointer<const float>(bias);
  op.residual = pointer<const float>(residual);
  op.output = pointer<float>(output);
  op.rows = rows;
  op.in = in;
  op.out = out;
  check("dense_linear", backend::dense_linear(op, launch_at(where)));
}

inline void dense_conv(Address input, Address weight, Address bias, Address residual, Address output, int64_t n,
                       int64_t height, int64_t width, int64_t in, int64_t out, std::uintptr_t where) {
  DenseConv op;
  op.input = pointer<const float>(input);
  op.weight = pointer<const float>(weight);
  op.bias = pointer<const float>(bias);
  op.residual = pointer<const float>(residual);
  op.output = pointer<float>(output);
  op.n = n;
  op.height = height;
  op.width = width;
  op.in = in;
  op.out = out;
  check("dense_conv", backend::dense_conv(op, launch_at(where)));
}

inline void dense_group_norm(Address input, Address weight, Address bias, Address modulation, Address output, int64_t n,
                             int64_t pixels, int64_t channels, int64_t groups, double eps, bool silu,
                             std::uintptr_t where) {
  DenseGroupNorm op;
  op.input = pointer<const float>(input);
  op.weight = pointer<const float>(weight);
  op.bias = pointer<const float>(bias);
  op.modulation = pointer<const float>(modulation);
  op.output = pointer<float>(output);
  op.n = n;
  op.pixels = pixels;
  op.channels = channels;
  op.groups = groups;
  op.eps = eps;
  op.silu = silu;
  check("dense_group_norm", backend::dense_group_norm(op, launch_at(where)));
}

inline void bind_dense(py::module_& module) {
  module.def("dense_serves", &backend::dense_serves);
  module.def("dense_linear", &dense_linear, py::call_guard<py::gil_scoped_release>());
  module.def("dense_conv", &dense_conv, py::call_guard<py::gil_scoped_release>());
  module.def("dense_group_norm", &dense_group_norm, py::call_guard<py::gil_scoped_release>());
}

}  // namespace bindings
}  // namespace dff
