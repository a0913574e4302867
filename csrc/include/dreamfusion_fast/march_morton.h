// Marching rays through an occupancy grid in Morton order, by the rules of torch-ngp's raymarching, which its forks
// share (after Mueller et al. 2022, appendix E.1).
//
// From t_0 = t_near + noise dt(t_near) on, steps are dt(t) = clamp(t cone_angle, min_step, max_step). A step that
// begins at t is looked up at its beginning, clamped into the box [-bound, bound]^3, in cascade c, whose box is
// [-min(2^c, bound), min(2^c, bound)]^3: the finest one that holds the position and whose cells are no shorter than the
// step, roughly. Where the cell is empty, the steps that begin before the ray leaves it are passed over.
#pragma once

#include "dreamfusion_fast/common.h"
#include "dreamfusion_fast/march.h"

namespace dff {

// Every third bit of the result is one of the ten of `value`.
DFF_HD uint32_t spread_bits(uint32_t value) {
  value = (value | (value << 16)) & 0x030000ffu;
  value = (value | (value << 8)) & 0x0300f00fu;
  value = (value | (value << 4)) & 0x030c30c3u;
  return (value | (value << 2)) & 0x09249249u;
}

template <typename T>
struct MortonRays {
  const T* origins;         // [n_rays, 3]
  const T* directions;      // [n_rays, 3]
  const T* t_near;          // [n_rays]
  const T* t_far;           // [n_rays]
  const T* noise;           // [n_rays] part of a step by which the first one is put off
  const uint8_t* bitfield;  // [cascades * resolution^3 / 8] bit i of byte b is cell 8 b + i in Morton order
  int32_t resolution;       // a power of two
  int32_t cascades;
  T bound;
  T cone_angle;
  T min_step;
  T max_step;
  int32_t limit;  // at most so many samples a ray
  bool contract;  // positions beyond [-1, 1]^3 are drawn into [-2, 2]^3 (Barron et al. 2022, by the largest coordinate)
  int64_t n_rays;

  // With `value` NaN, the other: as fmin and fmax have it, which C++ compilers leave to a library.
  DFF_HD static T at_least(T lowest, T value) { return value > lowest ? value : lowest; }
  DFF_HD static T at_most(T highest, T value) { return value < highest ? value : highest; }

  DFF_HD T step_at(T t) const { return at_most(max_step, at_least(min_step, t * cone_angle)); }

  // The first cascade with extent < 2^cascade, or the last one.
  DFF_HD int32_t level_of(T extent) const {
    int32_t level = 0;
    for (T edge = 1; level < cascades - 1 && extent >= edge; edge *= T(2)) ++level;
    return level;
  }

  // Calls visit(position, t, dt) for each sample, with t at the step's end, in order. False: it was the last one.
  template <typename Visit>
  DFF_HD void each_sample(int64_t ray, Visit&& visit) const {
    const T far = t_far[ray];
    const T size = static_cast<T>(resolution);
    const T cell_size = T(1) / size;
    T origin[3], direction[3], inverse[3];
    DFF_UNROLL
    for (int axis = 0; axis < 3; ++axis) {
      origin[axis] = origins[3 * ray + axis];
      direction[axis] = directions[3 * ray + axis];
      inverse[axis] = T(1) / direction[axis];
    }
    T t = t_near[ray];
    t += step_at(t) * noise[ray];
    T until = -T(INFINITY);  // steps that begin before it are passed over
    int32_t count = 0;
    for (int32_t k = 0; k < kMaxSteps && count < limit && t < far; ++k) {
      const T dt = step_at(t);
      const T end = t + dt;
      if (!(end > t)) return;  // the step is lost in the rounding of the distance
      if (t < until) {
        t = end;
        continue;
      }
      T position[3];
      T largest = 0;
      DFF_UNROLL
      for (int axis = 0; axis < 3; ++axis) {
        position[axis] = at_most(bound, at_least(-bound, origin[axis] + t * direction[axis]));
        largest = at_least(largest, std::fabs(position[axis]));
      }
      const int32_t by_place = level_of(largest);
      const int32_t by_step = level_of(dt * size * T(0.5));
      const int32_t level = by_place > by_step ? by_place : by_step;
      const T half = at_most(bound, static_cast<T>(1 << level));
      const T inverse_half = T(1) / half;
      const bool contracted = contract && largest > T(1);
      const T scale = contracted ? (T(2) - T(1) / largest) / largest : T(1);
      uint32_t index = 0;
      int32_t cell[3];
      DFF_UNROLL
      for (int axis = 0; axis < 3; ++axis) {
        if (contracted) position[axis] *= scale;
        const T own = T(0.5) * (position[axis] * inverse_half + T(1)) * size;
        cell[axis] = static_cast<int32_t>(at_most(size - T(1), at_least(T(0), own)));
        index |= spread_bits(static_cast<uint32_t>(cell[axis])) << axis;
      }
      const int64_t bit = static_cast<int64_t>(level) * resolution * resolution * resolution + index;
      if ((bitfield[bit >> 3] >> (bit & 7)) & 1) {
        ++count;
        if (!visit(position, end, dt)) return;
      } else if (!contracted) {
        T leave = T(INFINITY);
        DFF_UNROLL
        for (int axis = 0; axis < 3; ++axis) {
          const T wall = static_cast<T>(cell[axis]) + T(0.5) + std::copysign(T(0.5), direction[axis]);
          leave = at_most(leave, ((wall * cell_size * T(2) - T(1)) * half - position[axis]) * inverse[axis]);
        }
        until = t + at_least(T(0), leave);
      }
      t = end;
    }
  }
};

template <typename T>
struct MortonCount {
  MortonRays<T> rays;
  int32_t* counts;  // [n_rays]

  DFF_HD void operator()(int64_t ray) const {
    int32_t count = 0;
    rays.each_sample(ray, [&](const T*, T, T) {
      ++count;
      return true;
    });
    counts[ray] = count;
  }
};

template <typename T>
struct MortonWrite {
  MortonRays<T> rays;
  const int32_t* offsets;  // [n_rays + 1] prefix sum of the counts; nullptr: each ray has rows for `limit` samples
  T* positions;            // [n_samples, 3]
  T* spans;                // [n_samples, 2] t, dt
  int32_t* ray_indices;    // [n_samples]; nullptr without offsets

  DFF_HD void operator()(int64_t ray) const {
    int64_t slot = offsets != nullptr ? offsets[ray] : ray * rays.limit;
    const int64_t end = offsets != nullptr ? offsets[ray + 1] : slot + rays.limit;
    if (slot >= end) return;
    rays.each_sample(ray, [&](const T* position, T t, T dt) {
      DFF_UNROLL
      for (int axis = 0; axis < 3; ++axis) positions[3 * slot + axis] = position[axis];
      spans[2 * slot] = t;
      spans[2 * slot + 1] = dt;
      if (offsets != nullptr) ray_indices[slot] = static_cast<int32_t>(ray);
      return ++slot < end;
    });
  }
};

DFF_LAUNCHER(template <typename T> Status morton_count(const MortonCount<T>& op, const Launch& launch);)
DFF_LAUNCHER(template <typename T> Status morton_write(const MortonWrite<T>& op, const Launch& launch);)

}  // namespace dff
