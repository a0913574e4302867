// A table [n, channels] in any layout: samples next to each other on a GPU, where neighbouring threads take
// neighbouring samples, channels next to each other on a CPU, where one loop takes all channels of a sample.
#pragma once

#include "dreamfusion_fast/common.h"

namespace dff {

template <typename T>
struct View {
  T* data = nullptr;
  int64_t row = 0;      // elements from one sample to the next
  int64_t channel = 0;  // elements from one channel to the next

  DFF_HD T& operator()(int64_t sample, int index) const { return data[sample * row + index * channel]; }
  DFF_HD bool empty() const { return data == nullptr; }
};

}  // namespace dff
