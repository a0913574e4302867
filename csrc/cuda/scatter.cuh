// What kernels share that add the gradients of samples to a table: samples in wide loads, sums in wide atomics.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "any_view.cuh"

namespace dff::cuda {

// Samples loaded at once: one vector load of 16 bytes for a plane of float32. Of float64 one, whose registers run out.
template <typename Scalar>
constexpr int kChunk = std::is_same_v<Scalar, float> ? 4 : 1;

// A channel of samples [first, first + kCount), as far as they lie before `end`.
template <typename Scalar, int kCount>
__device__ __forceinline__ void load_chunk(const AnyView& view, bool fours, uint32_t first, uint32_t end,
                                           uint32_t channel, Scalar (&values)[kCount]) {
  if constexpr (std::is_same_v<Scalar, double>) {
    static_assert(kCount == 1);
    values[0] = load_element<double>(view, first, channel);
  } else if (fours) {
    load_four(view, first, channel, values);
  } else {
    uint32_t bits[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) bits[i] = first + i < end ? load_bits(view, first + i, channel) : 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = decode(view.type, bits[i]);
  }
}

// Whether there is anything to add.
template <int kCount, typename Scalar>
__device__ __forceinline__ bool any(const Scalar (&values)[kCount]) {
  bool found = false;
#pragma unroll
  for (int i = 0; i < kCount; ++i) found |= values[i] != Scalar(0);  // NaN is not zero
  return found;
}

// The first sample of a chunk, which moves up by one.
template <int kChannels, int kCount, typename Scalar>
__device__ __forceinline__ void take(Scalar (&chunk)[kChannels][kCount], Scalar (&values)[kChannels]) {
#pragma unroll
  for (int channel = 0; channel < kChannels; ++channel) {
    values[channel] = chunk[channel][0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) chunk[channel][i - 1] = chunk[channel][i];
  }
}

// How many floats one atomic transaction takes.
#if __CUDA_ARCH__ >= 900 && CUDART_VERSION >= 12010
constexpr int kAtomicFloats = 4;
#else
constexpr int kAtomicFloats = 1;
#endif

// Adds kCount successive values, in as few transactions as may be; `to` is aligned to their size or 16 bytes.
template <int kCount, typename Scalar>
__device__ __forceinline__ void atomic_add(Scalar* to, const Scalar (&values)[kCount]) {
  constexpr int kWidest = std::is_same_v<Scalar, float> ? kAtomicFloats : 1;
  constexpr int kWidth = kCount < kWidest ? kCount : kWidest;
#pragma unroll
  for (int i = 0; i < kCount; i += kWidth) {
    if constexpr (kWidth == 4) {
      atomicAdd(reinterpret_cast<float4*>(to + i), make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]));
    } else if constexpr (kWidth == 2) {
      atomicAdd(reinterpret_cast<float2*>(to + i), make_float2(values[i], values[i + 1]));
    } else {
      atomicAdd(to + i, values[i]);
    }
  }
}

}  // namespace dff::cuda
