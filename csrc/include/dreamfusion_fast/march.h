// Marching rays through the occupancy grid: equally spaced samples, or samples at the distances of a table, those in
// empty cells left out.
//
// The set of samples is defined by visiting every k = 0, 1, 2, ...: t_k = t_near + (k + u) step, kept when t_k < t_far
// and the cell of origin + t_k direction is occupied. With a table of distances d_0 < d_1 < ..., the same for all rays,
// t_k = d_k + u (d_{k+1} - d_k), kept when t_near <= t_k, too. Empty space is crossed in one go, by cells and by blocks
// of cells, without changing that set by a bit: the index of a cell along one axis is a chain of rounded operations
// each of which is monotone in k, so it is monotone itself. Hence if samples k and n - 1 lie in the same cell (block),
// so do all between them, and where the analytic exit of the cell suggests to go on with sample n, looking up sample n
// - 1 proves or refutes it. The same holds for a ray that has yet to enter the box along some axis.
//
// Scenes larger than an object have C cascades of the grid (Mueller et al. 2022, appendix E.1): cascade c, with as many
// cells, spans the box grown 2^c times about its centre. A sample is looked up in the first cascade whose box it is in.
// A position p along an axis, in cells of cascade 0, is q_c = (p - R / 2) / 2^c + R / 2 in those of cascade c: monotone
// again. And who is outside of cascade c on one side of one axis, is so for all before c: the sign of a sum survives
// rounding, and at the upper side R / 2 is far more than what is rounded. Hence samples between k and n - 1 belong to
// cascade c and one group of its cells if both ends do, and if both ends are outside of cascade c - 1 on the same side
// of the same axis.
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
  const T* distances;       // [n_steps + 1] rising; nullptr: equal steps from t_near on
  const uint8_t* bitfield;  // [ceil(cascades * resolution^3 / 8)] bit i of byte b is cell 8 b + i; nullptr: all cells
                            // are occupied
  const uint8_t* blocks;    // [cascades * ceil(resolution / 8)^3] whether any cell of the block is occupied; unused
                            // without bitfield
  T step;                   // unused with distances
  int32_t n_steps;          // at most so many samples a ray
  int32_t resolution;       // even with several cascades
  int32_t cascades;
  int32_t low[3];   // the box of the last cascade's cells in which all occupied ones lie, low <= cell < high: the whole
  int32_t high[3];  // grid, or less where finding it costs less than what it saves
  bool jitter;      // u uniform in [0, 1) per ray instead of 0.5
  uint64_t seed;
  const int64_t* seed_offset;  // [1] added to the seed, for CUDA graphs, where numbers are fixed; nullptr: 0
  int64_t n_rays;

  // Sets low and high.
  void take_whole_grid() {
    for (int axis = 0; axis < 3; ++axis) {
      low[axis] = 0;
      high[axis] = resolution;
    }
  }

  // Whether more than one grid and equal steps is asked for.
  bool wide() const { return distances != nullptr || cascades > 1; }
};

struct MarchBlocks {
  const uint8_t* bitfield;  // [ceil(cascades * resolution^3 / 8)]
  uint8_t* blocks;          // [cascades * ceil(resolution / 8)^3]
  int32_t resolution;
  int32_t cascades;

  DFF_HD void operator()(int64_t index) const {
    const int32_t n = blocks_along(resolution);
    const int32_t cascade = static_cast<int32_t>(index / (n * n * n));
    const int32_t block = static_cast<int32_t>(index % (n * n * n));
    const int32_t x0 = block / (n * n) * kBlock;
    const int32_t y0 = block / n % n * kBlock;
    const int32_t z0 = block % n * kBlock;
    const int32_t x1 = x0 + kBlock < resolution ? x0 + kBlock : resolution;
    const int32_t y1 = y0 + kBlock < resolution ? y0 + kBlock : resolution;
    const int32_t z1 = z0 + kBlock < resolution ? z0 + kBlock : resolution;
    const bool rows_are_bytes = resolution % kBlock == 0;
    unsigned any = 0;
    for (int32_t x = x0; x < x1 && any == 0; ++x) {
      for (int32_t y = y0; y < y1; ++y) {
        const int32_t row = ((cascade * resolution + x) * resolution + y) * resolution;
        if (rows_are_bytes) {
          any |= bitfield[(row + z0) >> 3];
        } else {
          for (int32_t cell = row + z0; cell < row + z1; ++cell) any |= (bitfield[cell >> 3] >> (cell & 7)) & 1u;
        }
      }
    }
    blocks[index] = any != 0;
  }
};

// Its loops over axes have to be unrolled, and no array indexed by what is known only when running: nvcc would put
// them, and the rays' struct with them, into local memory.
//
// kWide: with cascades or a table of distances, as rays.wide() tells. The marcher for one grid and equal steps does
// without what they cost.
template <typename T, bool kWide>
class RayMarcher {
 public:
  DFF_HD RayMarcher(const MarchRays<T>& rays, int64_t ray)
      : rays_(rays), t_near_(rays.t_near[ray]), t_far_(rays.t_far[ray]) {
    bool moves = false;
    least_scale_ = T(INFINITY);
    DFF_UNROLL
    for (int axis = 0; axis < 3; ++axis) {
      origin_[axis] = rays.origins[3 * ray + axis];
      direction_[axis] = rays.directions[3 * ray + axis];
      low_[axis] = rays.aabb[axis];
      scale_[axis] = static_cast<T>(rays.resolution) / (rays.aabb[axis + 3] - rays.aabb[axis]);
      cell_time_[axis] = T(1) / (scale_[axis] * direction_[axis]);
      low_time_[axis] = (low_[axis] - origin_[axis]) / direction_[axis];
      moves = moves || direction_[axis] != T(0);
      least_scale_ = scale_[axis] < least_scale_ ? scale_[axis] : least_scale_;
    }
    valid_ = moves && t_near_ - t_near_ == T(0);
    inverse_step_ = T(1) / rays.step;
    const uint64_t seed = rays.seed + (rays.seed_offset != nullptr ? static_cast<uint64_t>(*rays.seed_offset) : 0);
    offset_ = rays.jitter ? uniform<T>(seed, static_cast<uint32_t>(ray)) : T(0.5);
  }

  // Calls visit(k, t) for each sample from k = first on, in order, until it returns false.
  template <typename Visit>
  DFF_HD void each_sample(int32_t first, Visit&& visit) const {
    if (!valid_) return;
    T position[3];
    for (int32_t k = begin(first); k < rays_.n_steps;) {
      const T t = distance(k);
      if (!(t < t_far_)) return;
      locate(t, position);
      const Cascade cascade = cascade_of(position);
      if (cascade.index < 0) {
        k = next_towards_box(k, position);
        if (k < 0) return;
        continue;
      }
      if (rays_.bitfield != nullptr) {
        int32_t cell[3];
        locate_cell(cascade, position, cell);
        if (!block_occupied(cascade, cell)) {
          k = next_after(k, position, cascade, cell, kBlock);
          continue;
        }
        if (!occupied(cascade, cell)) {
          k = worth_skipping(k, cascade) ? next_after(k, position, cascade, cell, 1) : k + 1;
          continue;
        }
      }
      if (!visit(k, t)) return;
      ++k;
    }
  }

  // Whether sample k is kept, found without its neighbours, and its distance.
  DFF_HD bool keeps(int32_t k, T* t) const {
    if (!valid_ || k >= rays_.n_steps) return false;
    *t = distance(k);
    if (!(*t < t_far_) || (from_table() && *t < t_near_)) return false;
    T position[3];
    locate(*t, position);
    const Cascade cascade = cascade_of(position);
    if (cascade.index < 0) return false;
    if (rays_.bitfield == nullptr) return true;
    int32_t cell[3];
    locate_cell(cascade, position, cell);
    return occupied(cascade, cell);
  }

  // Whether sample k and all after it lie behind the ray's end, or behind a distance at which it has left the box.
  DFF_HD bool passed(int32_t k, T left) const {
    if (!valid_ || k >= rays_.n_steps) return true;
    const T t = distance(k);
    return !(t < t_far_) || t > left;
  }

  // A distance at which the ray has left the last cascade's box for certain: that of a box a cell larger, and a little
  // more for what is rounded on the way there.
  DFF_HD T left() const {
    const Cascade last = last_cascade();
    T leave = T(INFINITY);
    DFF_UNROLL
    for (int axis = 0; axis < 3; ++axis) {
      if (direction_[axis] == T(0)) continue;
      const T wall = direction_[axis] > T(0) ? static_cast<T>(rays_.resolution) + T(1) : T(-1);
      const T t = crossing(axis, from_within(last, wall));
      leave = t < leave ? t : leave;
    }
    return leave + T(1e-4) * (leave < T(0) ? -leave : leave);
  }

  // The length of sample k.
  DFF_HD T length(int32_t k) const { return from_table() ? rays_.distances[k + 1] - rays_.distances[k] : rays_.step; }

 private:
  struct Cascade {
    int32_t index;  // -1: outside of all
    T shrink;       // 2^-index
  };

  DFF_HD bool from_table() const { return kWide && rays_.distances != nullptr; }

  DFF_HD T distance(int32_t k) const {
    if (from_table()) {
      const T end = rays_.distances[k + 1];
      const T t = rays_.distances[k] + offset_ * (end - rays_.distances[k]);
      return t < end ? t : end;  // whatever was rounded, the distances never fall
    }
    return t_near_ + (static_cast<T>(k) + offset_) * rays_.step;
  }

  // The first sample from `first` on that is not before t_near.
  DFF_HD int32_t begin(int32_t first) const {
    if (!from_table() || first >= rays_.n_steps || distance(first) >= t_near_) return first;
    return first_between(first, rays_.n_steps, t_near_);
  }

  // The first sample at or after t; sample `before` is known to be before it, sample `end` not to be.
  DFF_HD int32_t first_between(int32_t before, int32_t end, T t) const {
    while (end - before > 1) {
      const int32_t middle = before + (end - before) / 2;
      if (distance(middle) < t) {
        before = middle;
      } else {
        end = middle;
      }
    }
    return end;
  }

  // The position in units of cells of cascade 0, as all positions below are.
  DFF_HD void locate(T t, T position[3]) const {
    DFF_UNROLL
    for (int axis = 0; axis < 3; ++axis) {
      position[axis] = (origin_[axis] + t * direction_[axis] - low_[axis]) * scale_[axis];
    }
  }

  // The same in units of cells of another cascade.
  DFF_HD T within(const Cascade& cascade, T position) const {
    if (!kWide || cascade.shrink == T(1)) return position;
    const T half = static_cast<T>(rays_.resolution) * T(0.5);
    return (position - half) * cascade.shrink + half;
  }

  DFF_HD void locate_cell(const Cascade& cascade, const T position[3], int32_t cell[3]) const {
    DFF_UNROLL
    for (int axis = 0; axis < 3; ++axis) cell[axis] = static_cast<int32_t>(within(cascade, position[axis]));
  }

  // About the way back: good enough for a suggestion.
  DFF_HD T from_within(const Cascade& cascade, T cells) const {
    if (!kWide || cascade.shrink == T(1)) return cells;
    const T half = static_cast<T>(rays_.resolution) * T(0.5);
    return (cells - half) / cascade.shrink + half;
  }

  DFF_HD Cascade last_cascade() const {
    if (!kWide) return {0, T(1)};
    return {rays_.cascades - 1, T(1) / static_cast<T>(1 << (rays_.cascades - 1))};
  }

  // The first cascade whose box holds the position.
  DFF_HD Cascade cascade_of(const T position[3]) const {
    const Cascade last = last_cascade();
    const bool inside = inside_along(0, within(last, position[0])) && inside_along(1, within(last, position[1])) &&
                        inside_along(2, within(last, position[2]));
    if (!inside) return {-1, T(1)};
    Cascade cascade = {0, T(1)};
    while (kWide && cascade.index < last.index &&
           !(in_grid(within(cascade, position[0])) && in_grid(within(cascade, position[1])) &&
             in_grid(within(cascade, position[2])))) {
      ++cascade.index;
      cascade.shrink *= T(0.5);
    }
    return cascade;
  }

  DFF_HD bool in_grid(T position) const { return position >= T(0) && position < static_cast<T>(rays_.resolution); }

  // In the box of the last cascade, or what is occupied of it.
  DFF_HD bool inside_along(int axis, T position) const {
    return position >= static_cast<T>(rays_.low[axis]) && position < static_cast<T>(rays_.high[axis]);
  }

  DFF_HD bool occupied(const Cascade& cascade, const int32_t cell[3]) const {
    const int32_t x = kWide ? cascade.index * rays_.resolution + cell[0] : cell[0];
    const int32_t index = (x * rays_.resolution + cell[1]) * rays_.resolution + cell[2];
    return (rays_.bitfield[index >> 3] >> (index & 7)) & 1;
  }

  DFF_HD bool block_occupied(const Cascade& cascade, const int32_t cell[3]) const {
    const int32_t n = blocks_along(rays_.resolution);
    const int32_t x = kWide ? cascade.index * n + cell[0] / kBlock : cell[0] / kBlock;
    return rays_.blocks[(x * n + cell[1] / kBlock) * n + cell[2] / kBlock];
  }

  DFF_HD bool worth_skipping(int32_t k, const Cascade& cascade) const {
    return length(k) * least_scale_ * (kWide ? cascade.shrink : T(1)) < kWorthSkipping;
  }

  // About the distance at which the ray is `cells` cells from the low corner along one axis: good enough to suggest
  // where to go on, since what it suggests is verified.
  DFF_HD T crossing(int axis, T cells) const { return cells * cell_time_[axis] + low_time_[axis]; }

  // About the first sample at or after distance t; at least k + 1.
  DFF_HD int32_t first_from(T t, int32_t k) const {
    if (from_table()) {
      // What is skipped is short as a rule: look close by first.
      int32_t before = k;
      int32_t stride = 1;
      while (stride < rays_.n_steps - before && distance(before + stride) < t) {
        before += stride;
        stride *= 2;
      }
      return first_between(before, stride < rays_.n_steps - before ? before + stride : rays_.n_steps, t);
    }
    const T n = (t - t_near_) * inverse_step_ - offset_;
    if (!(n > static_cast<T>(k + 1))) return k + 1;
    return n < static_cast<T>(kMaxSteps) ? static_cast<int32_t>(n) + 1 : kMaxSteps;
  }

  // The sample to go on with after sample k, which is in an empty group of `size`^3 cells (1 or kBlock). Sample n - 1
  // being in that group too is what allows to go on with n; rounding may have put n too far by one, and then the one
  // before is tried.
  DFF_HD int32_t next_after(int32_t k, const T position[3], const Cascade& cascade, const int32_t cell[3],
                            int32_t size) const {
    T leave = T(INFINITY);
    DFF_UNROLL
    for (int axis = 0; axis < 3; ++axis) {
      if (direction_[axis] == T(0)) continue;
      const int32_t low_wall = cell[axis] / size * size;
      const T wall = static_cast<T>(direction_[axis] > T(0) ? low_wall + size : low_wall);
      const T t = crossing(axis, from_within(cascade, wall));
      leave = t < leave ? t : leave;
    }
    int32_t n = first_from(leave, k);
    for (int attempt = 0; attempt < 2 && n > k + 1; ++attempt, --n) {
      T last[3];
      locate(distance(n - 1), last);
      bool same = outside_of_finer(cascade, position, last);
      DFF_UNROLL
      for (int axis = 0; axis < 3; ++axis) {
        const T own = within(cascade, last[axis]);
        same = same && (kWide ? in_grid(own) : inside_along(axis, own)) &&
               static_cast<int32_t>(own) / size == cell[axis] / size;
      }
      if (same) return n;
    }
    return k + 1;
  }

  // Whether all positions between two are outside of the cascades before this one, as both of them are.
  DFF_HD bool outside_of_finer(const Cascade& cascade, const T one[3], const T other[3]) const {
    if (!kWide || cascade.index == 0) return true;
    const Cascade finer = {cascade.index - 1, cascade.shrink * T(2)};
    const T high = static_cast<T>(rays_.resolution);
    DFF_UNROLL
    for (int axis = 0; axis < 3; ++axis) {
      const T a = within(finer, one[axis]);
      const T b = within(finer, other[axis]);
      if ((a < T(0) && b < T(0)) || (a >= high && b >= high)) return true;
    }
    return false;
  }

  // The same for sample k outside the box; -1 when the ray does not come (back) in.
  DFF_HD int32_t next_towards_box(int32_t k, const T position[3]) const {
    const Cascade box = last_cascade();
    int last_axis = -1;
    T enter = -T(INFINITY);
    DFF_UNROLL
    for (int axis = 0; axis < 3; ++axis) {
      const T own = within(box, position[axis]);
      if (inside_along(axis, own)) continue;
      const bool approaches = before_box(axis, own);
      if (!approaches) return -1;
      const T wall = static_cast<T>(direction_[axis] > T(0) ? rays_.low[axis] : rays_.high[axis]);
      const T t = crossing(axis, from_within(box, wall));
      if (last_axis < 0 || t > enter) {
        enter = t;
        last_axis = axis;
      }
    }
    int32_t n = first_from(enter, k);
    for (int attempt = 0; attempt < 2 && n > k + 1; ++attempt, --n) {
      T last[3];
      locate(distance(n - 1), last);
      DFF_UNROLL
      for (int axis = 0; axis < 3; ++axis) {
        if (axis == last_axis && before_box(axis, within(box, last[axis]))) return n;
      }
    }
    return k + 1;
  }

  DFF_HD bool before_box(int axis, T position) const {
    return direction_[axis] > T(0) ? position < static_cast<T>(rays_.low[axis])
                                   : direction_[axis] < T(0) && position >= static_cast<T>(rays_.high[axis]);
  }

  const MarchRays<T>& rays_;
  T origin_[3];
  T direction_[3];
  T low_[3];
  T scale_[3];      // cells per unit of length
  T cell_time_[3];  // distance along the ray from one wall to the next, signed
  T low_time_[3];   // distance along the ray to the box's low side
  T least_scale_;
  T inverse_step_;
  T t_near_;
  T t_far_;
  T offset_;
  bool valid_;
};

template <typename T>
struct MarchCount {
  MarchRays<T> rays;
  int32_t* counts;  // [n_rays]
  int32_t* firsts;  // [n_rays] k of the ray's first sample, for MarchWrite to begin at

  template <bool kWide>
  DFF_HD void march(int64_t ray) const {
    int32_t count = 0;
    int32_t first = 0;
    RayMarcher<T, kWide>(rays, ray).each_sample(0, [&](int32_t k, T) {
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
  T* lengths;              // [capacity]; nullptr without distances
  int32_t* ray_indices;    // [capacity]
  int64_t capacity;        // samples that do not fit are not written

  template <bool kWide>
  DFF_HD void march(int64_t ray) const {
    int64_t slot = offsets[ray];
    const int64_t end = offsets[ray + 1] < capacity ? offsets[ray + 1] : capacity;
    if (slot >= end) return;
    const RayMarcher<T, kWide> marcher(rays, ray);
    marcher.each_sample(firsts[ray], [&](int32_t k, T distance) {
      t[slot] = distance;
      if (kWide && lengths != nullptr) lengths[slot] = marcher.length(k);
      ray_indices[slot] = static_cast<int32_t>(ray);
      return ++slot < end;
    });
  }
};

DFF_LAUNCHER(Status march_blocks(const MarchBlocks& op, const Launch& launch);)
DFF_LAUNCHER(template <typename T> Status march_count(const MarchCount<T>& op, const Launch& launch);)
DFF_LAUNCHER(template <typename T> Status march_write(const MarchWrite<T>& op, const Launch& launch);)

}  // namespace dff
