// Threads for the CUDA driver: one per index.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "dreamfusion_fast/common.h"

namespace dff::cuda {

// What the launch just made reports; to be called right after each.
inline Status launch_status() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Launches kernel(arguments...) on the launch's stream, whose parameters are copied into it.
template <typename... Parameters, typename... Arguments>
Status launch_kernel(void (*kernel)(Parameters...), dim3 blocks, int threads, const Launch& launch,
                     const Arguments&... arguments) {
  if (blocks.x == 0) return nullptr;
  kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(launch.stream)>>>(arguments...);
  return launch_status();
}

template <int kThreads, typename Op>
__global__ void __launch_bounds__(kThreads) for_each_kernel(int64_t n, Op op) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride) op(i);
}

// Calls op(i) for each i of [0, n) on the launch's stream. The op's struct travels as a kernel parameter.
template <int kThreads = 128, typename Op>
Status for_each(int64_t n, const Launch& launch, const Op& op) {
  if (n <= 0) return nullptr;
  const int64_t blocks = std::min<int64_t>((n + kThreads - 1) / kThreads, 0x7fffffff);
  return launch_kernel(&for_each_kernel<kThreads, Op>, static_cast<unsigned>(blocks), kThreads, launch, n, op);
}

}  // namespace dff::cuda
