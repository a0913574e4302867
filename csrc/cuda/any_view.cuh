// Elements of views that know their type at run time: one kernel serves all types, and a choice that is the same for
// all threads costs little beside a gather.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "dreamfusion_fast/view.h"
#include "row.cuh"

namespace dff::cuda {

__device__ __forceinline__ float to_scalar(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_scalar(float value) { return value; }
__device__ __forceinline__ double to_scalar(double value) { return value; }

// The bits of an element of at most 32 bits as a float.
__device__ __forceinline__ float decode(ElementType type, uint32_t bits) {
  return type == ElementType::kFloat32    ? __uint_as_float(bits)
         : type == ElementType::kBFloat16 ? __uint_as_float(bits << 16)
                                          : __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

__device__ __forceinline__ uint32_t load_bits(const AnyView& view, uint32_t sample, uint32_t channel) {
  return view.type == ElementType::kFloat32 ? view.as<const uint32_t>()(sample, channel)
                                            : view.as<const uint16_t>()(sample, channel);
}

template <typename Scalar>
__device__ __forceinline__ Scalar load_element(const AnyView& view, uint32_t sample, uint32_t channel) {
  if constexpr (std::is_same_v<Scalar, double>) {
    return view.as<const double>()(sample, channel);
  } else {
    return decode(view.type, load_bits(view, sample, channel));
  }
}

template <typename Scalar>
__device__ __forceinline__ void store_element(const AnyView& view, uint32_t sample, uint32_t channel, Scalar value) {
  if constexpr (std::is_same_v<Scalar, double>) {
    view.as<double>()(sample, channel) = value;
  } else if (view.type == ElementType::kFloat32) {
    view.as<float>()(sample, channel) = value;
  } else if (view.type == ElementType::kBFloat16) {
    view.as<__nv_bfloat16>()(sample, channel) = __float2bfloat16_rn(value);
  } else {
    view.as<__half>()(sample, channel) = __float2half_rn(value);
  }
}

// Positions, directions and gradients by positions are of the type that is computed in.
template <typename Scalar>
__device__ __forceinline__ void load_vector(const AnyView& view, uint32_t sample, Scalar (&vector)[3]) {
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) vector[axis] = view.as<const Scalar>()(sample, axis);
}

template <typename Scalar>
__device__ __forceinline__ void store_vector(const AnyView& view, uint32_t sample, const Scalar (&vector)[3]) {
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) view.as<Scalar>()(sample, axis) = vector[axis];
}

// The same view for the compiler, which now knows its type.
template <typename Scalar>
__device__ __forceinline__ AnyView of_scalar(AnyView view) {
  view.type = std::is_same_v<Scalar, double> ? ElementType::kFloat64 : ElementType::kFloat32;
  return view;
}

// The channels [channel, channel + kCount) of a sample: in one go if `row`, that is, where has_rows() holds.
template <int kCount, typename Scalar>
__device__ __forceinline__ void load_elements(const AnyView& view, bool row, uint32_t sample, uint32_t channel,
                                              Scalar (&values)[kCount]) {
  if (row) {
    const Scalar* from = static_cast<const Scalar*>(view.data) + sample * view.sample_stride + channel;
    const Row<Scalar, kCount> loaded = *reinterpret_cast<const Row<Scalar, kCount>*>(from);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = loaded.values[i];
  } else if constexpr (std::is_same_v<Scalar, double>) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = load_element<double>(view, sample, channel + i);
  } else {  // decoding branches, which would wait for one load before the next
    uint32_t bits[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) bits[i] = load_bits(view, sample, channel + i);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = decode(view.type, bits[i]);
  }
}

template <int kCount, typename Scalar>
__device__ __forceinline__ void store_elements(const AnyView& view, bool row, uint32_t sample, uint32_t channel,
                                               const Scalar (&values)[kCount]) {
  if (row) {
    Row<Scalar, kCount> stored;
#pragma unroll
    for (int i = 0; i < kCount; ++i) stored.values[i] = values[i];
    Scalar* to = static_cast<Scalar*>(view.data) + sample * view.sample_stride + channel;
    *reinterpret_cast<Row<Scalar, kCount>*>(to) = stored;
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) store_element(view, sample, channel + i, values[i]);
  }
}

// Whether the `count` successive channels of a level, in a type that they are computed in, may be accessed as a row.
inline bool has_rows(const AnyView& view, int count) {
  if (view.type != ElementType::kFloat32 && view.type != ElementType::kFloat64) return false;
  const std::uintptr_t size = view.type == ElementType::kFloat32 ? 4 : 8;
  const std::uintptr_t width = std::min<std::uintptr_t>(size * count, 16);
  return view.channel_stride == 1 && view.sample_stride * size % width == 0 &&
         reinterpret_cast<std::uintptr_t>(view.data) % width == 0;
}

// A channel of four successive samples, the first one a multiple of 4, in one load. Only for float32 and smaller, where
// has_fours() holds.
__device__ __forceinline__ void load_four(const AnyView& view, uint32_t sample, uint32_t channel, float (&values)[4]) {
  const uint32_t index = sample + channel * view.channel_stride;
  if (view.type == ElementType::kFloat32) {
    const float4 four = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(view.data) + index));
    values[0] = four.x;
    values[1] = four.y;
    values[2] = four.z;
    values[3] = four.w;
  } else {
    const uint2 two = __ldg(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(view.data) + index));
    values[0] = decode(view.type, two.x & 0xffff);
    values[1] = decode(view.type, two.x >> 16);
    values[2] = decode(view.type, two.y & 0xffff);
    values[3] = decode(view.type, two.y >> 16);
  }
}

// Whether each channel is a contiguous plane that starts where a load of four may.
inline bool has_fours(const AnyView& view) {
  const std::uintptr_t width = view.type == ElementType::kFloat32 ? 16 : 8;
  return view.data == nullptr ||
         (view.type != ElementType::kFloat64 && view.sample_stride == 1 && view.channel_stride % 4 == 0 &&
          reinterpret_cast<std::uintptr_t>(view.data) % width == 0);
}

// How many samples of a tile for `capacity` there are; null: all.
__device__ __forceinline__ uint32_t live_samples(const int32_t* count, int64_t capacity) {
  const int32_t most = static_cast<int32_t>(capacity);
  return static_cast<uint32_t>(count == nullptr ? most : min(max(__ldg(count), 0), most));
}

}  // namespace dff::cuda
