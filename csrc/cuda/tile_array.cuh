// Elements of a tile's arrays, which know their type at run time: one kernel serves all types, and a choice that is the
// same for all threads costs little beside a gather.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "dreamfusion_fast/hash_grid_tile.h"

namespace dff {
namespace cuda {

// The bits of an element of at most 32 bits as a float.
__device__ __forceinline__ float decode(ElementType type, uint32_t bits) {
  return type == ElementType::kFloat32    ? __uint_as_float(bits)
         : type == ElementType::kBFloat16 ? __uint_as_float(bits << 16)
                                          : __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

template <typename Scalar>
__device__ __forceinline__ Scalar load_element(const TileArray& array, uint32_t sample, uint32_t channel) {
  const uint32_t index = sample * array.sample_stride + channel * array.channel_stride;
  if constexpr (std::is_same_v<Scalar, double>) {
    return static_cast<const double*>(array.data)[index];
  } else {
    const uint32_t bits = array.type == ElementType::kFloat32 ? static_cast<const uint32_t*>(array.data)[index]
                                                              : static_cast<const uint16_t*>(array.data)[index];
    return decode(array.type, bits);
  }
}

template <typename Scalar>
__device__ __forceinline__ void store_element(const TileArray& array, uint32_t sample, uint32_t channel, Scalar value) {
  const uint32_t index = sample * array.sample_stride + channel * array.channel_stride;
  if constexpr (std::is_same_v<Scalar, double>) {
    static_cast<double*>(array.data)[index] = value;
  } else if (array.type == ElementType::kFloat32) {
    static_cast<float*>(array.data)[index] = value;
  } else if (array.type == ElementType::kBFloat16) {
    static_cast<__nv_bfloat16*>(array.data)[index] = __float2bfloat16_rn(value);
  } else {
    static_cast<__half*>(array.data)[index] = __float2half_rn(value);
  }
}

// A channel of four successive samples, the first one a multiple of 4, in one load. Only for float32 and smaller, where
// has_vectors() holds.
__device__ __forceinline__ void load_vector(const TileArray& array, uint32_t sample, uint32_t channel,
                                            float (&values)[4]) {
  const uint32_t index = sample + channel * array.channel_stride;
  if (array.type == ElementType::kFloat32) {
    const float4 four = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(array.data) + index));
    values[0] = four.x;
    values[1] = four.y;
    values[2] = four.z;
    values[3] = four.w;
  } else {
    const uint2 two = __ldg(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(array.data) + index));
    values[0] = decode(array.type, two.x & 0xffff);
    values[1] = decode(array.type, two.x >> 16);
    values[2] = decode(array.type, two.y & 0xffff);
    values[3] = decode(array.type, two.y >> 16);
  }
}

// Whether each channel is a contiguous plane that starts where a vector of four may.
inline bool has_vectors(const TileArray& array) {
  const std::uintptr_t width = array.type == ElementType::kFloat32 ? 16 : 8;
  return array.data == nullptr ||
         (array.type != ElementType::kFloat64 && array.sample_stride == 1 && array.channel_stride % 4 == 0 &&
          reinterpret_cast<std::uintptr_t>(array.data) % width == 0);
}

// How many samples of the tile there are.
__device__ __forceinline__ uint32_t live_samples(const HashGridTile& tile) {
  const int32_t capacity = static_cast<int32_t>(tile.levels.n_samples);
  const int32_t count = tile.count == nullptr ? capacity : min(max(__ldg(tile.count), 0), capacity);
  return static_cast<uint32_t>(count);
}

}  // namespace cuda
}  // namespace dff
