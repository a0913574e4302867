// What every op of the native core shares: the host/device marker, how a launch is described and what it reports.
#pragma once

#include <cmath>
#include <cstdint>

// A function that both drivers call: nvcc compiles it twice, a C++ compiler once.
#if defined(__CUDACC__)
#define DFF_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define DFF_HD __forceinline
#else
#define DFF_HD inline __attribute__((always_inline))
#endif

// Before a loop of at most 8 rounds that has to disappear.
#if defined(__CUDACC__)
#define DFF_UNROLL _Pragma("unroll")
#elif defined(__clang__)
#define DFF_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define DFF_UNROLL _Pragma("GCC unroll 8")
#else
#define DFF_UNROLL
#endif

// Declares one launcher for both drivers: dff::cpu::name and dff::cuda::name.
#define DFF_LAUNCHER(...) \
  namespace cpu {         \
  __VA_ARGS__             \
  }                       \
  namespace cuda {        \
  __VA_ARGS__             \
  }

// Defines that launcher, a template over the scalar type, for float and double.
#define DFF_FOR_FLOATS(name, Op)                         \
  template Status name(const Op<float>&, const Launch&); \
  template Status name(const Op<double>&, const Launch&)

namespace dff {

// Where an op runs. A driver reads the field that is its own.
struct Launch {
  int threads = 1;         // CPU: how many threads may work on it
  void* stream = nullptr;  // CUDA: cudaStream_t
};

// nullptr when the launch went well, else what went wrong. The text lives forever.
using Status = const char*;

// The two drivers.
namespace cpu {}
namespace cuda {}

}  // namespace dff
