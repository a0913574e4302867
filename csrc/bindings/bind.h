// What the bindings of every op share. An op is bound by listing the members of its struct: Python gives their values
// in that order, then `where`, and the struct travels to the driver.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "dreamfusion_fast/common.h"
#include "dreamfusion_fast/view.h"

namespace dff::bindings {

namespace py = pybind11;
namespace backend = dff::DFF_BACKEND;  // dff::cpu or dff::cuda, whichever this module is

// The address of a tensor's first element (torch.Tensor.data_ptr()); 0 stands for no tensor.
using Address = std::uintptr_t;

// How a member comes from Python: its type there, and how it is read. Numbers and flags come as they are.
template <typename Member, typename = void>
struct FromPython {
  using Type = Member;
  static void read(Type value, Member& member) { member = value; }
};

template <typename T>
struct FromPython<T*> {
  using Type = Address;
  static void read(Type address, T*& member) { member = reinterpret_cast<T*>(address); }
};

template <>
struct FromPython<float> {
  using Type = double;
  static void read(Type value, float& member) { member = static_cast<float>(value); }
};

template <typename Enum>
struct FromPython<Enum, std::enable_if_t<std::is_enum_v<Enum>>> {
  using Type = std::underlying_type_t<Enum>;
  static void read(Type value, Enum& member) { member = static_cast<Enum>(value); }
};

template <typename T, size_t kCount>
struct FromPython<T[kCount]> {
  using Type = std::array<typename FromPython<T>::Type, kCount>;
  static void read(const Type& values, T (&members)[kCount]) {
    for (size_t i = 0; i < kCount; ++i) FromPython<T>::read(values[i], members[i]);
  }
};

// A struct within an op's comes as a tuple of the members listed.
template <typename Struct, auto... kMembers>
struct FromTuple {
  // By the type of a member, not by the member: Clang 14 takes no pack of `auto` for an alias with an `auto`.
  template <typename Member>
  using Python = FromPython<std::remove_reference_t<decltype(std::declval<Struct>().*std::declval<Member>())>>;

  using Type = std::tuple<typename Python<decltype(kMembers)>::Type...>;
  static void read(const Type& values, Struct& filled) {
    std::apply([&](const auto&... value) { (Python<decltype(kMembers)>::read(value, filled.*kMembers), ...); }, values);
  }
};

template <typename T>
struct FromPython<View<T>> : FromTuple<View<T>, &View<T>::data, &View<T>::sample_stride, &View<T>::channel_stride> {};

template <>
struct FromPython<AnyView>
    : FromTuple<AnyView, &AnyView::data, &AnyView::sample_stride, &AnyView::channel_stride, &AnyView::type> {};

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

// Binds run(op, launch) as `name`, which is called without the GIL held.
template <typename Op, typename... Members>
void def(py::module_& module, const std::string& name, Status (*run)(const Op&, const Launch&),
         Members Op::*... members) {
  const auto function = [=](const typename FromPython<Members>::Type&... values, std::uintptr_t where) {
    Op op;
    (FromPython<Members>::read(values, op.*members), ...);
    check(name.c_str(), run(op, launch_at(where)));
  };
  module.def(name.c_str(), function, py::call_guard<py::gil_scoped_release>());
}

// What the names of functions for one scalar type end with.
template <typename T>
const std::string kSuffix = std::is_same_v<T, float> ? "_f32" : "_f64";

}  // namespace dff::bindings
