// Packed arrays as views: how an op over arrays of one type becomes tiles.
#pragma once

#include <cstdint>
#include <type_traits>

#include "dreamfusion_fast/view.h"

namespace dff::cuda {

template <typename Scalar>
constexpr ElementType kType = std::is_same_v<Scalar, double> ? ElementType::kFloat64 : ElementType::kFloat32;

// The rows from `first` on of [n_samples, columns].
template <typename Scalar>
AnyView rows_from(const Scalar* data, int64_t first, int columns) {
  AnyView view;
  if (data == nullptr) return view;
  view.data = const_cast<Scalar*>(data + first * columns);
  view.sample_stride = static_cast<uint32_t>(columns);
  view.channel_stride = 1;
  view.type = kType<Scalar>;
  return view;
}

}  // namespace dff::cuda
