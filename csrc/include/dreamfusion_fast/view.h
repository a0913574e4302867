// A table [n_samples, n_channels] in any layout: samples next to each other on a GPU, where neighbouring threads take
// neighbouring samples, channels next to each other on a CPU, where one loop takes all channels of a sample.
#pragma once

#include <type_traits>

#include "dreamfusion_fast/common.h"

namespace dff {

constexpr int kMaxTileSamples = 1 << 24;

// Strides count elements, and the last element's index must fit into 32 bits, in which GPUs compute faster.
template <typename T>
struct View {
  T* data = nullptr;  // null: none
  uint32_t sample_stride = 0;
  uint32_t channel_stride = 0;

  DFF_HD uint32_t index(uint32_t sample, uint32_t channel) const {
    return sample * sample_stride + channel * channel_stride;
  }
  DFF_HD std::add_lvalue_reference_t<T> operator()(uint32_t sample, uint32_t channel) const {
    return data[index(sample, channel)];
  }
  DFF_HD bool empty() const { return data == nullptr; }
};

enum class ElementType : int32_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2, kFloat64 = 3 };

// A view whose elements have a type that only a running program knows.
struct AnyView : View<void> {
  ElementType type = ElementType::kFloat32;

  // The same as elements of T, which have to be as wide as its own.
  template <typename T>
  DFF_HD View<T> as() const {
    View<T> view;
    view.data = static_cast<T*>(data);
    view.sample_stride = sample_stride;
    view.channel_stride = channel_stride;
    return view;
  }
};

}  // namespace dff
