// A tensor [n, channels] of any strides as it comes from Python: (address, stride of a row, stride of a channel).
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "bindings/bind.h"
#include "dreamfusion_fast/view.h"

namespace dff {
namespace bindings {

using ViewArguments = std::tuple<Address, int64_t, int64_t>;

template <typename T>
View<T> view(const ViewArguments& arguments) {
  View<T> result;
  result.data = pointer<T>(std::get<0>(arguments));
  result.row = std::get<1>(arguments);
  result.channel = std::get<2>(arguments);
  return result;
}

}  // namespace bindings
}  // namespace dff
