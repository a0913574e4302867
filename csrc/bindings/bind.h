// What the bindings of every op share: addresses to pointers, a launch from Python's description, errors to exceptions.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "dreamfusion_fast/common.h"

namespace dff {
namespace bindings {

namespace py = pybind11;
namespace backend = dff::DFF_BACKEND;  // dff::cpu or dff::cuda, whichever this module is

// The address of a tensor's first element (torch.Tensor.data_ptr()); 0 stands for no tensor.
using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// `where` is a thread count in the CPU module and a stream handle in the CUDA module.
inline Launch launch_at(std::uintptr_t where) {
  Launch launch;
#if defined(DFF_CUDA_ARCHS)
  launch.stream = reinterpret_cast<void*>(where);
#else
  launch.threads = static_cast<int>(where);
#endif
  return launch;
}

inline void check(const char* op, Status status) {
  if (status != nullptr) throw std::runtime_error(std::string(op) + ": " + status);
}

// Registers function<float> as name_f32 and function<double> as name_f64, both without the GIL held.
#define DFF_DEF(module, name, function)                                                              \
  (module).def(name "_f32", &function<float>, pybind11::call_guard<pybind11::gil_scoped_release>()); \
  (module).def(name "_f64", &function<double>, pybind11::call_guard<pybind11::gil_scoped_release>())

}  // namespace bindings
}  // namespace dff
