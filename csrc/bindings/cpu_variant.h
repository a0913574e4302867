// Which of the CPU cores this processor can run. A wheel has several (DREAMFUSION_FAST_PORTABLE in CMakeLists.txt),
// which differ in nothing but the instructions that they were compiled for.
#pragma once

#include <string>
#include <vector>

#include "bindings/bind.h"

namespace dff::bindings {

// The modules beside this one that this processor runs, the best first.
inline std::vector<std::string> cpu_variants() {
  std::vector<std::string> names;
#if defined(DFF_CPU_VARIANTS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512) names.push_back("_core_avx512");
  if (avx2) names.push_back("_core_avx2");
#endif
  return names;
}

inline void bind_cpu_variant(py::module_& module) {
  module.attr("cpu_target") = DFF_CPU_TARGET;  // what this module was compiled for, in words
  module.def("cpu_variants", &cpu_variants);
}

}  // namespace dff::bindings
