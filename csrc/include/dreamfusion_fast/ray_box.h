// Where rays enter and leave an axis-aligned box (the slab method).
#pragma once

#include "dreamfusion_fast/common.h"

namespace dff {

template <typename T>
struct RayBox {
  const T* origins;     // [n_rays, 3]
  const T* directions;  // [n_rays, 3]
  const T* aabb;        // [6] xmin, ymin, zmin, xmax, ymax, zmax
  T t_min;              // no entry before this distance
  T t_max;              // no exit after this distance
  T* t_near;            // [n_rays] +inf on a miss
  T* t_far;             // [n_rays] +inf on a miss
  int64_t n_rays;

  DFF_HD void operator()(int64_t ray) const {
    T enter = t_min;
    T leave = t_max;
    bool hit = true;
    for (int axis = 0; axis < 3; ++axis) {
      const T origin = origins[3 * ray + axis];
      const T direction = directions[3 * ray + axis];
      const T low = aabb[axis];
      const T high = aabb[axis + 3];
      if (direction == T(0)) {
        // Parallel to the slab: inside for ever or never.
        hit = hit && low <= origin && origin <= high;
        continue;
      }
      const T t_low = (low - origin) / direction;
      const T t_high = (high - origin) / direction;
      const T first = t_low < t_high ? t_low : t_high;
      const T last = t_low < t_high ? t_high : t_low;
      hit = hit && t_low == t_low && t_high == t_high;  // a NaN in the ray is a miss
      enter = first > enter ? first : enter;
      leave = last < leave ? last : leave;
    }
    hit = hit && enter < leave;
    t_near[ray] = hit ? enter : T(INFINITY);
    t_far[ray] = hit ? leave : T(INFINITY);
  }
};

DFF_LAUNCHER(template <typename T> Status ray_box(const RayBox<T>& op, const Launch& launch);)

}  // namespace dff
