#pragma once

#include "bindings/bind.h"
#include "dreamfusion_fast/ray_sums.h"

namespace dff::bindings {

template <typename T>
struct FromPython<SampleHead<T>>
    : FromTuple<SampleHead<T>, &SampleHead<T>::centre, &SampleHead<T>::extent, &SampleHead<T>::activation,
                &SampleHead<T>::blob_scale, &SampleHead<T>::blob_width, &SampleHead<T>::ball, &SampleHead<T>::shading,
                &SampleHead<T>::ambient, &SampleHead<T>::diffuse, &SampleHead<T>::light, &SampleHead<T>::light_stride> {
};

template <typename T>
struct FromPython<SampleTile<T>>
    : FromTuple<SampleTile<T>, &SampleTile<T>::offsets, &SampleTile<T>::ray_range, &SampleTile<T>::directions,
                &SampleTile<T>::t, &SampleTile<T>::lengths, &SampleTile<T>::positions, &SampleTile<T>::logits,
                &SampleTile<T>::slopes, &SampleTile<T>::n_rays, &SampleTile<T>::first, &SampleTile<T>::capacity,
                &SampleTile<T>::step, &SampleTile<T>::n_channels> {};

template <typename T>
void bind_ray_sums(py::module_& module) {
  using Forward = RaySumsForward<T>;
  def(module, "ray_sums_forward" + kSuffix<T>, &backend::ray_sums_forward<T>, &Forward::head, &Forward::tile,
      &Forward::sums, &Forward::prefix, &Forward::distortion, &Forward::entropy);

  using Backward = RaySumsBackward<T>;
  def(module, "ray_sums_backward" + kSuffix<T>, &backend::ray_sums_backward<T>, &Backward::head, &Backward::tile,
      &Backward::sums, &Backward::grad_sums, &Backward::prefix, &Backward::suffix_after, &Backward::suffix,
      &Backward::grad_logits, &Backward::grad_slopes, &Backward::distortion, &Backward::entropy);

  using Visible = RaySumsVisible<T>;
  def(module, "ray_sums_visible" + kSuffix<T>, &backend::ray_sums_visible<T>, &Visible::head, &Visible::tile,
      &Visible::depths, &Visible::counts, &Visible::kept, &Visible::limit, &Visible::least);
}

}  // namespace dff::bindings
