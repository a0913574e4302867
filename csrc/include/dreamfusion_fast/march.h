// Marching rays through the occupancy grid: equally spaced samples, those in empty cells left out.
//
// The set of samples is defined by visiting every k = 0, 1, 2, ...: t_k = t_near + (k + u) step, kept when t_k < t_far
// and the cell of origin + t_k direction is occupied. Empty space is crossed in one go, by cells and by blocks of
// cells, without changing that set by a bit: the index of a cell along one axis is a chain of rounded operations each
// of which is monotone in k, so it is monotone itself. Hence if samples k and n - 1 lie in the same cell (block), so do
// all between them, and where the analytic exit of the cell suggests to go on with sample n, looking up sample n - 1
// proves or refutes it. The same holds for a ray that has yet to enter the box along some axis.
#pragma once

#include "dreamfusion_fast/common.h"
#include "dreamfusion_fast/random.h"

namespace dff {

// Blocks of kBlock^3 cells tell at once that none of them is occupied. Eight, so that with a resolution that is a
// multiple of it, a row of a block is one byte of the bitfield.
constexpr int32_t kBlock = 8;

DFF_HD int32_t blocks_along(int32_t resolution) { return (resolution + kBlock - 1) / kBlock; }

// A step of more than this part of a cell leaves it so soon that finding out when takes longer than stepping.
constexpr float kWorthSkipping = 0.4f;

// A ray has at most this many steps: up to here a float counts them exactly.
constexpr int32_t kMaxSteps = 1 << 24;

template <typename T>
struct MarchRays {
  const T* origins;         // [n_rays, 3]
  const T* directions;      // [n_rays, 3]
  const T* t_near;          // [n_rays] +-inf or NaN: no samples
  const T* t_far;           // [n_rays]
  const T* aabb;            // [6] xmin, ymin, zmin, xmax, ymax, zmax; nothing outside it is occupied
  const uint8_t* bitfield;  // [ceil(resolution^3 / 8)] bit i of byte b is cell 8 b + i; nullptr: all cells are occupied
  const uint8_t* blocks;  // [ceil(resolution / 8)^3] whether any cell of the block is occupied; unused without bitfield
  T step;
  int32_t resolution;
  int32_t low[3];  // the box of cells in which all occupied ones lie, low <= cell < high: the whole grid, or less where
  int32_t high[3];  // finding it costs less than what it saves
  bool jitter;      // u uniform in [0, 1) per ray instead of 0.5
  uint64_t seed;
  int64_t n_rays;
};

struct MarchBlocks {
  const uint8_t* bitfield;  // [ceil(resolution^3 / 8)]
  uint8_t* blocks;          // [ceil(resolution / 8)^3]
  int32_t resolution;

  DFF_HD void operator()(int64_t block) const {
    const int32_t n = blocks_along(resolution);
    const int32_t x0 = static_cast<int32_t>(block / (n * n)) * kBlock;
    const int32_t y0 = static_cast<int32_t>(block / n % n) * kBlock;
    const int32_t z0 = static_cast<int32_t>(block % n) * kBlock;
    const int32_t x1 = x0 + kBlock < resolution ? x0 + kBlock : resolution;
    const int32_t y1 = y0 + kBlock < resolution ? y0 + kBlock : resolution;
    const int32_t z1 = z0 + kBlock < resolution ? z0 + kBlock : resolution;
    const bool rows_are_bytes = resolution % kBlock == 0;
    unsigned any = 0;
    for (int32_t x = x0; x < x1 && any == 0; ++x) {
      for (int32_t y = y0; y < y1; ++y) {
        const int32_t row = (x * resolution + y) * resolution;
        if (rows_are_bytes) {
          any |= bitfield[(row + z0) >> 3];
        } else {
          for (int32_t cell = row + z0; cell < row + z1; ++cell) any |= (bitfield[cell >> 3] >> (cell & 7)) & 1u;
        }
      }
    }
    blocks[block] = any != 0;
  }
};

template <typename T>
class RayMarcher {
 public:
  DFF_HD RayMarcher(const MarchRays<T>& rays, int64_t ray)
      : rays_(rays), t_near_(rays.t_near[ray]), t_far_(rays.t_far[ray]) {
    bool moves = false;
    skips_cells_ = false;
    for (int axis = 0; axis < 3; ++axis) {
      origin_[axis] = rays.origins[3 * ray + axis];
      direction_[axis] = rays.directions[3 * ray + axis];
      low_[axis] = rays.aabb[axis];
      scale_[axis] = static_cast<T>(rays.resolution) / (rays.aabb[axis + 3] - rays.aabb[axis]);
      cell_time_[axis] = T(1) / (scale_[axis] * direction_[axis]);
      low_time_[axis] = (low_[axis] - origin_[axis]) / direction_[axis];
      moves = moves || direction_[axis] != T(0);
      skips_cells_ = skips_cells_ || rays.step * scale_[axis] < kWorthSkipping;
    }
    valid_ = moves && t_near_ - t_near_ == T(0);
    inverse_step_ = T(1) / rays.step;
    offset_ = rays.jitter ? uniform<T>(rays.seed, static_cast<uint32_t>(ray)) : T(0.5);
  }

  // Calls visit(k, t) for each sample from k = first on, in order, until it returns false.
  template <typename Visit>
  DFF_HD void each_sample(int32_t first, Visit&& visit) const {
    if (!valid_) return;
    T place[3];
    for (int32_t k = first; k < kMaxSteps;) {
      const T t = distance(k);
      if (!(t < t_far_)) return;
      locate(t, place);
      if (!inside(place)) {
        k = next_towards_box(k, place);
        if (k < 0) return;
        continue;
      }
      if (rays_.bitfield != nullptr) {
        const int32_t cell[3] = {static_cast<int32_t>(place[0]), static_cast<int32_t>(place[1]),
                                 static_cast<int32_t>(place[2])};
        if (!block_occupied(cell)) {
          k = next_after(k, cell, kBlock);
          continue;
        }
        if (!occupied(cell)) {
          k = skips_cells_ ? next_after(k, cell, 1) : k + 1;
          continue;
        }
      }
      if (!visit(k, t)) return;
      ++k;
    }
  }

  // Whether sample k is kept, found without its neighbours, and its distance.
  DFF_HD bool keeps(int32_t k, T* t) const {
    *t = distance(k);
    if (!valid_ || k >= kMaxSteps || !(*t < t_far_)) return false;
    T place[3];
    locate(*t, place);
    if (!inside(place)) return false;
    if (rays_.bitfield == nullptr) return true;
    const int32_t cell[3] = {static_cast<int32_t>(place[0]), static_cast<int32_t>(place[1]),
                             static_cast<int32_t>(place[2])};
    return occupied(cell);
  }

 private:
  DFF_HD T distance(int32_t k) const { return t_near_ + (static_cast<T>(k) + offset_) * rays_.step; }

  // The place in units of cells.
  DFF_HD void locate(T t, T place[3]) const {
    for (int axis = 0; axis < 3; ++axis) {
      place[axis] = (origin_[axis] + t * direction_[axis] - low_[axis]) * scale_[axis];
    }
  }

  DFF_HD bool inside(const T place[3]) const {
    return inside_along(0, place[0]) && inside_along(1, place[1]) && inside_along(2, place[2]);
  }

  DFF_HD bool inside_along(int axis, T place) const {
    return place >= static_cast<T>(rays_.low[axis]) && place < static_cast<T>(rays_.high[axis]);
  }

  DFF_HD bool occupied(const int32_t cell[3]) const {
    const int32_t index = (cell[0] * rays_.resolution + cell[1]) * rays_.resolution + cell[2];
    return (rays_.bitfield[index >> 3] >> (index & 7)) & 1;
  }

  DFF_HD bool block_occupied(const int32_t cell[3]) const {
    const int32_t n = blocks_along(rays_.resolution);
    return rays_.blocks[((cell[0] / kBlock) * n + cell[1] / kBlock) * n + cell[2] / kBlock];
  }

  // About the distance at which the ray is `cells` cells from the low corner along one axis: good enough to suggest
  // where to go on, since what it suggests is verified.
  DFF_HD T crossing(int axis, T cells) const { return cells * cell_time_[axis] + low_time_[axis]; }

  // About the first sample at or after distance t; at least k + 1.
  DFF_HD int32_t first_from(T t, int32_t k) const {
    const T n = (t - t_near_) * inverse_step_ - offset_;
    if (!(n > static_cast<T>(k + 1))) return k + 1;
    return n < static_cast<T>(kMaxSteps) ? static_cast<int32_t>(n) + 1 : kMaxSteps;
  }

  // The sample to go on with after sample k, which is in an empty group of `size`^3 cells (1 or kBlock). Sample n - 1
  // being in that group too is what allows to go on with n; rounding may have put n too far by one, and then the one
  // before is tried.
  DFF_HD int32_t next_after(int32_t k, const int32_t cell[3], int32_t size) const {
    T leave = T(INFINITY);
    for (int axis = 0; axis < 3; ++axis) {
      if (direction_[axis] == T(0)) continue;
      const int32_t low_wall = cell[axis] / size * size;
      const T t = crossing(axis, static_cast<T>(direction_[axis] > T(0) ? low_wall + size : low_wall));
      leave = t < leave ? t : leave;
    }
    int32_t n = first_from(leave, k);
    for (int attempt = 0; attempt < 2 && n > k + 1; ++attempt, --n) {
      T last[3];
      locate(distance(n - 1), last);
      if (inside(last) && static_cast<int32_t>(last[0]) / size == cell[0] / size &&
          static_cast<int32_t>(last[1]) / size == cell[1] / size &&
          static_cast<int32_t>(last[2]) / size == cell[2] / size) {
        return n;
      }
    }
    return k + 1;
  }

  // The same for sample k outside the box; -1 when the ray does not come (back) in.
  DFF_HD int32_t next_towards_box(int32_t k, const T place[3]) const {
    int last_axis = -1;
    T enter = -T(INFINITY);
    for (int axis = 0; axis < 3; ++axis) {
      if (inside_along(axis, place[axis])) continue;
      const bool approaches = before_box(axis, place[axis]);
      if (!approaches) return -1;
      const T t = crossing(axis, static_cast<T>(direction_[axis] > T(0) ? rays_.low[axis] : rays_.high[axis]));
      if (last_axis < 0 || t > enter) {
        enter = t;
        last_axis = axis;
      }
    }
    int32_t n = first_from(enter, k);
    for (int attempt = 0; attempt < 2 && n > k + 1; ++attempt, --n) {
      T last[3];
      locate(distance(n - 1), last);
      if (before_box(last_axis, last[last_axis])) return n;
    }
    return k + 1;
  }

  DFF_HD bool before_box(int axis, T place) const {
    return direction_[axis] > T(0) ? place < static_cast<T>(rays_.low[axis])
                                   : direction_[axis] < T(0) && place >= static_cast<T>(rays_.high[axis]);
  }

  const MarchRays<T>& rays_;
  T origin_[3];
  T direction_[3];
  T low_[3];
  T scale_[3];      // cells per unit of length
  T cell_time_[3];  // distance along the ray from one wall to the next, signed
  T low_time_[3];   // distance along the ray to the box's low side
  T inverse_step_;
  T t_near_;
  T t_far_;
  T offset_;
  bool valid_;
  bool skips_cells_;
};

template <typename T>
struct MarchCount {
  MarchRays<T> rays;
  int32_t* counts;  // [n_rays]
  int32_t* firsts;  // [n_rays] k of the ray's first sample, for MarchWrite to begin at

  DFF_HD void operator()(int64_t ray) const {
    int32_t count = 0;
    int32_t first = 0;
    RayMarcher<T>(rays, ray).each_sample(0, [&](int32_t k, T) {
      if (count++ == 0) first = k;
      return true;
    });
    counts[ray] = count;
    firsts[ray] = first;
  }
};

template <typename T>
struct MarchWrite {
  MarchRays<T> rays;
  const int32_t* firsts;   // [n_rays]
  const int32_t* offsets;  // [n_rays + 1] prefix sum of the counts
  T* t;                    // [capacity]
  int32_t* ray_indices;    // [capacity]
  int64_t capacity;        // samples that do not fit are not written

  DFF_HD void operator()(int64_t ray) const {
    int64_t place = offsets[ray];
    const int64_t end = offsets[ray + 1] < capacity ? offsets[ray + 1] : capacity;
    if (place >= end) return;
    RayMarcher<T>(rays, ray).each_sample(firsts[ray], [&](int32_t, T distance) {
      t[place] = distance;
      ray_indices[place] = static_cast<int32_t>(ray);
      return ++place < end;
    });
  }
};

DFF_LAUNCHER(Status march_blocks(const MarchBlocks& op, const Launch& launch);)
DFF_LAUNCHER(template <typename T> Status march_count(const MarchCount<T>& op, const Launch& launch);)
DFF_LAUNCHER(template <typename T> Status march_write(const MarchWrite<T>& op, const Launch& launch);)

}  // namespace dff
