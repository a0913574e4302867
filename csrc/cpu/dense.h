// What the dense layers share: eight floats as one value, and a few rows times one panel of packed weights.
#pragma once

#include <cstdint>
#include <cstring>

#include "dreamfusion_fast/dense.h"

// GCC's and clang's vector extensions, for processors with 16 registers of 8 floats and fused multiply-add.
#if defined(__GNUC__) && defined(__AVX2__) && defined(__FMA__)
#define DFF_DENSE 1

namespace dff::cpu {

constexpr int kLanes = 8;
typedef float Lanes __attribute__((vector_size(32)));

DFF_HD Lanes load_lanes(const float* from) {
  Lanes value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

DFF_HD void store_lanes(float* to, Lanes value) { std::memcpy(to, &value, sizeof(value)); }

DFF_HD Lanes all_lanes(float value) { return Lanes{value, value, value, value, value, value, value, value}; }

// sums[r] = sum over k of a[r * stride + k] * panel[k * 16 ...]. With 4 to 6 rows the 8 to 12 chains of additions keep
// both multipliers busy, and all fits into 16 registers.
template <int kRows>
DFF_HD void multiply_rows(const float* a, int64_t stride, const float* panel, int64_t depth, Lanes (&sums)[kRows][2]) {
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = Lanes{};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    const Lanes low = load_lanes(panel + k * kDensePanel);
    const Lanes high = load_lanes(panel + k * kDensePanel + kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const Lanes value = all_lanes(a[r * stride + k]);
      sums[r][0] += value * low;
      sums[r][1] += value * high;
    }
  }
}

// Calls store(row, low, high) for each of the rows.
template <int kRows, typename Store>
__attribute__((noinline)) void multiply_and_store(const float* a, int64_t stride, const float* panel, int64_t depth,
                                                  int64_t row, const Store& store) {
  Lanes sums[kRows][2];
  multiply_rows<kRows>(a + row * stride, stride, panel, depth, sums);
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) store(row + r, sums[r][0], sums[r][1]);
}

// The same for rows [0, rows): sixes, and fours where sixes leave a rest.
template <typename Store>
void multiply_all(const float* a, int64_t stride, const float* panel, int64_t depth, int64_t rows, const Store& store) {
  int64_t row = 0;
  while (rows - row >= 6 && rows - row != 8) multiply_and_store<6>(a, stride, panel, depth, row, store), row += 6;
  while (rows - row >= 4) multiply_and_store<4>(a, stride, panel, depth, row, store), row += 4;
  for (; row < rows; ++row) multiply_and_store<1>(a, stride, panel, depth, row, store);
}

}  // namespace dff::cpu
#else
#define DFF_DENSE 0
#endif
