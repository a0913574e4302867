// A few successive elements, and how they are loaded in as few instructions as the alignment allows.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

namespace dff::cuda {

template <typename Element, int kFeatures>
struct alignas(sizeof(Element) * kFeatures < 16 ? sizeof(Element) * kFeatures : 16) Row {
  Element values[kFeatures];
};

// A load through the read-only cache, as wide as the type.
template <typename T>
__device__ __forceinline__ T load_wide(const T* from) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) % 16 == 0);
  using Word = std::conditional_t<
      sizeof(T) == 2, unsigned short,
      std::conditional_t<sizeof(T) == 4, unsigned int, std::conditional_t<sizeof(T) == 8, uint2, uint4>>>;
  union {
    Word words[sizeof(T) / sizeof(Word)];
    T value;
  } both = {};
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / sizeof(Word)); ++i) {
    both.words[i] = __ldg(reinterpret_cast<const Word*>(from) + i);
  }
  return both.value;
}

}  // namespace dff::cuda
