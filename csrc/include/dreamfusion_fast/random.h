// Counter-based random numbers: a hash of (seed, index), the same on every device and in the PyTorch twin, with no
// state to keep.
#pragma once

#include "dreamfusion_fast/common.h"

namespace dff {

// The output function of PCG-RXS-M-XS-32 after one LCG step (O'Neill 2014; as a hash: Jarzynski and Olano 2020).
DFF_HD uint32_t pcg_hash(uint32_t value) {
  const uint32_t state = value * 747796405u + 2891336453u;
  const uint32_t word = ((state >> ((state >> 28u) + 4u)) ^ state) * 277803737u;
  return (word >> 22u) ^ word;
}

// Uniform in [0, 1), a multiple of 2^-24, so that float and double hold the same number.
template <typename T>
DFF_HD T uniform(uint64_t seed, uint32_t index) {
  const uint32_t key = pcg_hash(static_cast<uint32_t>(seed) ^ pcg_hash(static_cast<uint32_t>(seed >> 32u)));
  return static_cast<T>(pcg_hash(key ^ pcg_hash(index)) >> 8u) * T(1.0 / 16777216.0);
}

}  // namespace dff
