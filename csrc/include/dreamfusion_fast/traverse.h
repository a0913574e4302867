// Rays through levels of an occupancy grid, each ray with steps of its own: equal ones, ones that grow with the
// distance, or one for each cell that it crosses.
//
// The set of samples is defined by visiting every step. From t_0 = t_near on, step k is [t_k, t_{k+1}] with
// t_k = t_near + k step, or with a cone angle t_{k+1} = t_k + clamp(t_k cone_angle, step, max_step). It is kept when
// its middle is before t_far and in an occupied cell of the first level whose box holds it. Boxes may lie anywhere.
//
// Empty space is crossed in one go, and proved as in march.h: the position along an axis of a level is a chain of
// rounded operations that are monotone in the distance, hence in k. So steps between k and n belong to level l and one
// group of its cells if both ends do, and if for each level before l both ends are outside of it on the same side of
// the same axis. Outside of all levels the latter for each is enough. Growing steps are taken one by one all the same,
// but without a look at the grid.
//
// With a step of 0 or less, the walls of the cells cut the ray into pieces. A piece belongs to the cell in which its
// middle lies, and pieces of one cell, one behind the other, are one sample.
#pragma once

#include "dreamfusion_fast/common.h"
#include "dreamfusion_fast/march.h"

namespace dff {

template <typename T>
struct TraverseRays {
  const T* origins;     // [n_rays, 3]
  const T* directions;  // [n_rays, 3]
  const T* t_near;      // [n_rays] not finite: no samples
  const T* t_far;       // [n_rays]
  const T* levels;      // [n_levels, 3, 3] low corner, cells per unit of length (NaN: nothing lies in it), size of a
                        // cell, x, y, z each
  const uint8_t* occupied;  // [n_levels, cells...] 0 or 1
  const uint8_t* blocks;    // [n_levels, ceil(cells / 8)...] whether any cell of the block is occupied
  int32_t cells[3];         // along x, y, z, of each level
  int32_t n_levels;
  T step;        // 0 or less: one sample for each cell
  T cone_angle;  // 0: equal steps
  T max_step;
  int32_t limit;  // at most so many samples a ray, 1 or more
  int64_t n_rays;
};

struct TraverseBlocks {
  const uint8_t* occupied;  // [n_levels, cells...]
  uint8_t* blocks;          // [n_levels, ceil(cells / 8)...]
  int32_t cells[3];
  int32_t n_levels;

  DFF_HD int64_t count() const {
    return static_cast<int64_t>(n_levels) * blocks_along(cells[0]) * blocks_along(cells[1]) * blocks_along(cells[2]);
  }

  DFF_HD void operator()(int64_t index) const {
    const int32_t nx = blocks_along(cells[0]);
    const int32_t ny = blocks_along(cells[1]);
    const int32_t nz = blocks_along(cells[2]);
    const int64_t level = index / (static_cast<int64_t>(nx) * ny * nz);
    const int32_t x0 = static_cast<int32_t>(index / (static_cast<int64_t>(ny) * nz) % nx) * kBlock;
    const int32_t y0 = static_cast<int32_t>(index / nz % ny) * kBlock;
    const int32_t z0 = static_cast<int32_t>(index % nz) * kBlock;
    unsigned any = 0;
    for (int32_t x = x0; x < x0 + kBlock && x < cells[0] && any == 0; ++x) {
      for (int32_t y = y0; y < y0 + kBlock && y < cells[1]; ++y) {
        const uint8_t* row = occupied + ((level * cells[0] + x) * cells[1] + y) * cells[2];
        for (int32_t z = z0; z < z0 + kBlock && z < cells[2]; ++z) any |= row[z];
      }
    }
    blocks[index] = any != 0;
  }
};

// The steps of a ray. `state` is what a walk can begin anew with.

template <typename T>
struct EqualSteps {
  T near;
  T step;
  int32_t k;

  DFF_HD EqualSteps(const TraverseRays<T>& rays, T t_near, T state)
      : near(t_near), step(rays.step), k(static_cast<int32_t>(state)) {}
  DFF_HD static T first(T) { return T(0); }
  DFF_HD T state() const { return static_cast<T>(k); }
  DFF_HD T start() const { return near + static_cast<T>(k) * step; }
  DFF_HD T end() const { return near + (static_cast<T>(k) + T(1)) * step; }
  DFF_HD T middle() const { return near + (static_cast<T>(k) + T(0.5)) * step; }
  DFF_HD T length() const { return step; }
  DFF_HD bool goes_on() const { return k < kMaxSteps; }
  DFF_HD void advance() { ++k; }

  // About the last step whose middle is before t and t_far, at least this one, and the one before it.
  DFF_HD void last_before(T t, T t_far, EqualSteps* last, EqualSteps* before) const {
    const T until = t < t_far ? t : t_far;
    const T n = (until - near) / step - T(0.5);
    *last = *this;
    if (n > static_cast<T>(k)) last->k = n < static_cast<T>(kMaxSteps) ? static_cast<int32_t>(n) : kMaxSteps - 1;
    *before = *last;
    if (last->k > k) --before->k;
  }
};

template <typename T>
struct GrowingSteps {
  T cone_angle;
  T least;
  T most;
  T t;
  int32_t taken = 0;

  DFF_HD GrowingSteps(const TraverseRays<T>& rays, T, T state)
      : cone_angle(rays.cone_angle), least(rays.step), most(rays.max_step), t(state) {}
  DFF_HD static T first(T t_near) { return t_near; }
  DFF_HD T state() const { return t; }
  DFF_HD T start() const { return t; }
  DFF_HD T end() const { return t + length(); }
  DFF_HD T middle() const { return t + length() * T(0.5); }
  DFF_HD T length() const {
    const T grown = t * cone_angle;
    const T long_enough = grown > least ? grown : least;
    return long_enough < most ? long_enough : most;
  }
  // Not where the step is lost in the rounding of the distance.
  DFF_HD bool goes_on() const { return taken < kMaxSteps && end() > t; }
  DFF_HD void advance() {
    t = end();
    ++taken;
  }

  DFF_HD void last_before(T until, T t_far, GrowingSteps* last, GrowingSteps* before) const {
    *last = *before = *this;
    GrowingSteps next = *this;
    for (next.advance(); next.goes_on() && next.middle() < until && next.middle() < t_far; next.advance()) {
      *before = *last;
      *last = next;
    }
  }
};

// Its loops over axes have to be unrolled, for the reason that RayMarcher gives.
template <typename T>
class RayTraverser {
 public:
  DFF_HD RayTraverser(const TraverseRays<T>& rays, int64_t ray)
      : rays_(rays), t_near_(rays.t_near[ray]), t_far_(rays.t_far[ray]) {
    bool moves = false;
    bool finite = t_near_ - t_near_ == T(0);
    DFF_UNROLL
    for (int axis = 0; axis < 3; ++axis) {
      origin_[axis] = rays.origins[3 * ray + axis];
      direction_[axis] = rays.directions[3 * ray + axis];
      moves = moves || direction_[axis] != T(0);
      finite = finite && origin_[axis] - origin_[axis] == T(0) && direction_[axis] - direction_[axis] == T(0);
    }
    valid_ = moves && finite;
  }

  // What a walk along the whole ray begins with.
  DFF_HD T first() const { return equal_steps() ? EqualSteps<T>::first(t_near_) : t_near_; }

  DFF_HD T t_far() const { return t_far_; }

  // Calls visit(state, start, end) for each sample from a state on, in order, until it returns false.
  template <typename Visit>
  DFF_HD void each_sample(T state, Visit&& visit) const {
    if (!valid_) return;
    if (!(rays_.step > T(0))) {
      each_crossing(state, visit);
    } else if (equal_steps()) {
      each_step(EqualSteps<T>(rays_, t_near_, state), visit);
    } else {
      each_step(GrowingSteps<T>(rays_, t_near_, state), visit);
    }
  }

 private:
  struct Place {
    int32_t level;  // -1: outside of all
    int32_t cell[3];

    DFF_HD bool operator==(const Place& other) const {
      return level == other.level && cell[0] == other.cell[0] && cell[1] == other.cell[1] && cell[2] == other.cell[2];
    }
  };

  DFF_HD bool equal_steps() const { return rays_.step > T(0) && !(rays_.cone_angle > T(0)); }

  template <typename Steps, typename Visit>
  DFF_HD void each_step(Steps at, Visit&& visit) const {
    while (at.goes_on()) {
      const T middle = at.middle();
      if (!(middle < t_far_)) return;
      const Place place = locate(middle);
      if (place.level < 0) {
        const T enter = next_entry(middle);
        if (!(enter < T(INFINITY))) return;
        skip(&at, enter, place, 1);
      } else if (!block_occupied(place)) {
        skip(&at, exit_from(place, kBlock), place, kBlock);
      } else if (!occupied(place)) {
        if (at.length() * least_scale(place.level) < kWorthSkipping) {
          skip(&at, exit_from(place, 1), place, 1);
        } else {
          at.advance();
        }
      } else {
        if (!visit(at.state(), at.start(), at.end())) return;
        at.advance();
      }
    }
  }

  // Past the steps before distance t, as far as all of them are proved to be in the place of the first: one group of
  // `size`^3 cells, or outside of all levels. Rounding may have put the last one too far by one.
  template <typename Steps>
  DFF_HD void skip(Steps* at, T t, const Place& place, int32_t size) const {
    Steps last = *at;
    Steps before = *at;
    at->last_before(t, t_far_, &last, &before);
    if (between_alike(at->middle(), last.middle(), place, size)) {
      *at = last;
    } else if (between_alike(at->middle(), before.middle(), place, size)) {
      *at = before;
    }
    at->advance();
  }

  DFF_HD const T* level_of(int32_t level) const { return rays_.levels + 9 * level; }

  // In cells of a level.
  DFF_HD T position(int32_t level, int axis, T t) const {
    const T* grid = level_of(level);
    return (origin_[axis] + t * direction_[axis] - grid[axis]) * grid[3 + axis];
  }

  DFF_HD bool in_grid(int axis, T position) const {
    return position >= T(0) && position < static_cast<T>(rays_.cells[axis]);
  }

  DFF_HD Place locate(T t) const {
    Place place = {-1, {0, 0, 0}};
    for (int32_t level = 0; level < rays_.n_levels; ++level) {
      T own[3];
      bool inside = true;
      DFF_UNROLL
      for (int axis = 0; axis < 3; ++axis) {
        own[axis] = position(level, axis, t);
        inside = inside && in_grid(axis, own[axis]);
      }
      if (!inside) continue;
      place.level = level;
      DFF_UNROLL
      for (int axis = 0; axis < 3; ++axis) place.cell[axis] = static_cast<int32_t>(own[axis]);
      break;
    }
    return place;
  }

  DFF_HD bool occupied(const Place& place) const {
    const int64_t x = static_cast<int64_t>(place.level) * rays_.cells[0] + place.cell[0];
    return rays_.occupied[(x * rays_.cells[1] + place.cell[1]) * rays_.cells[2] + place.cell[2]] != 0;
  }

  DFF_HD bool block_occupied(const Place& place) const {
    const int64_t x = static_cast<int64_t>(place.level) * blocks_along(rays_.cells[0]) + place.cell[0] / kBlock;
    const int64_t y = x * blocks_along(rays_.cells[1]) + place.cell[1] / kBlock;
    return rays_.blocks[y * blocks_along(rays_.cells[2]) + place.cell[2] / kBlock] != 0;
  }

  DFF_HD T least_scale(int32_t level) const {
    const T* scale = level_of(level) + 3;
    const T least = scale[0] < scale[1] ? scale[0] : scale[1];
    return least < scale[2] ? least : scale[2];
  }

  // The distance of the wall below cell `wall` of a level along one axis; monotone in `wall`.
  DFF_HD T wall_time(int32_t level, int axis, T wall) const {
    const T* grid = level_of(level);
    return (grid[axis] + wall * grid[6 + axis] - origin_[axis]) / direction_[axis];
  }

  // About where the ray leaves a group of cells: good enough, since what it suggests is verified.
  DFF_HD T exit_from(const Place& place, int32_t size) const {
    T leave = T(INFINITY);
    DFF_UNROLL
    for (int axis = 0; axis < 3; ++axis) {
      if (direction_[axis] == T(0)) continue;
      const int32_t low_wall = place.cell[axis] / size * size;
      const T t = wall_time(place.level, axis, static_cast<T>(direction_[axis] > T(0) ? low_wall + size : low_wall));
      leave = t < leave ? t : leave;
    }
    return leave;
  }

  // About where the ray next enters a level, from outside of all; infinite if it enters none, which is exact: it moves
  // away from each along some axis.
  DFF_HD T next_entry(T t) const {
    T nearest = T(INFINITY);
    for (int32_t level = 0; level < rays_.n_levels; ++level) {
      bool ahead = true;
      T enter = t;
      DFF_UNROLL
      for (int axis = 0; axis < 3; ++axis) {
        const T own = position(level, axis, t);
        if (in_grid(axis, own)) continue;
        const bool upwards = direction_[axis] > T(0);
        const T size = static_cast<T>(rays_.cells[axis]);
        ahead = ahead && (upwards ? own < T(0) : direction_[axis] < T(0) && own >= size);
        const T wall = wall_time(level, axis, upwards ? T(0) : size);
        enter = wall > enter ? wall : enter;
      }
      // An entry that is too far to be told is ahead all the same.
      const T told = enter < T(INFINITY) ? enter : t;
      if (ahead && told < nearest) nearest = told;
    }
    return nearest;
  }

  // Whether all that is between two distances is in one group of cells of a level, or outside of all levels, as the
  // first of them is.
  DFF_HD bool between_alike(T one, T other, const Place& place, int32_t size) const {
    const int32_t others = place.level < 0 ? rays_.n_levels : place.level;
    for (int32_t level = 0; level < others; ++level) {
      if (!between_outside(level, one, other)) return false;
    }
    if (place.level < 0) return true;
    bool same = true;
    DFF_UNROLL
    for (int axis = 0; axis < 3; ++axis) {
      const T own = position(place.level, axis, other);
      same = same && in_grid(axis, own) && static_cast<int32_t>(own) / size == place.cell[axis] / size;
    }
    return same;
  }

  DFF_HD bool between_outside(int32_t level, T one, T other) const {
    bool outside = false;
    DFF_UNROLL
    for (int axis = 0; axis < 3; ++axis) {
      const T a = position(level, axis, one);
      const T b = position(level, axis, other);
      const T high = static_cast<T>(rays_.cells[axis]);
      outside = outside || (a < T(0) && b < T(0)) || (a >= high && b >= high) || a != a;
    }
    return outside;
  }

  template <typename Visit>
  DFF_HD void each_crossing(T at, Visit&& visit) const {
    Place open = {-1, {0, 0, 0}};
    T start = at;
    while (at < t_far_) {
      T next = t_far_;
      for (int32_t level = 0; level < rays_.n_levels; ++level) {
        const T wall = next_wall(level, at);
        next = wall < next ? wall : next;
      }
      Place place = locate(at + (next - at) * T(0.5));
      if (place.level >= 0 && !occupied(place)) place.level = -1;
      if (open.level >= 0 && !(place == open)) {
        if (!visit(start, start, at)) return;
        open.level = -1;
      }
      if (open.level < 0) {
        open = place;
        start = at;
      }
      at = next;
    }
    if (open.level >= 0) visit(start, start, at);
  }

  // The first distance after t at which the ray enters a level, leaves it, or goes from one of its cells into another.
  DFF_HD T next_wall(int32_t level, T t) const {
    T enter = -T(INFINITY);
    T leave = T(INFINITY);
    bool hit = true;
    DFF_UNROLL
    for (int axis = 0; axis < 3; ++axis) {
      if (direction_[axis] == T(0)) {
        hit = hit && in_grid(axis, position(level, axis, T(0)));
        continue;
      }
      const T low = wall_time(level, axis, T(0));
      const T high = wall_time(level, axis, static_cast<T>(rays_.cells[axis]));
      const T first = low < high ? low : high;
      const T last = low < high ? high : low;
      enter = first > enter ? first : enter;
      leave = last < leave ? last : leave;
    }
    if (!hit || !(enter < leave) || !(t < leave)) return T(INFINITY);
    if (t < enter) return enter;
    T next = leave;
    DFF_UNROLL
    for (int axis = 0; axis < 3; ++axis) {
      if (direction_[axis] == T(0)) continue;
      const T wall = next_wall_along(level, axis, t);
      next = wall < next ? wall : next;
    }
    return next;
  }

  DFF_HD T next_wall_along(int32_t level, int axis, T t) const {
    const int32_t count = rays_.cells[axis];
    const T own = position(level, axis, t);
    int32_t wall = own > T(0) ? (own < static_cast<T>(count) ? static_cast<int32_t>(own) : count) : 0;  // about
    const int32_t forward = direction_[axis] > T(0) ? 1 : -1;
    const auto behind = [&](int32_t w) { return !(wall_time(level, axis, static_cast<T>(w)) > t); };
    while (wall - forward >= 0 && wall - forward <= count && !behind(wall - forward)) wall -= forward;
    while (wall >= 0 && wall <= count && behind(wall)) wall += forward;
    return wall >= 0 && wall <= count ? wall_time(level, axis, static_cast<T>(wall)) : T(INFINITY);
  }

  const TraverseRays<T>& rays_;
  T origin_[3];
  T direction_[3];
  T t_near_;
  T t_far_;
  bool valid_;
};

template <typename T>
struct TraverseCount {
  TraverseRays<T> rays;
  int32_t* counts;  // [n_rays]
  T* firsts;        // [n_rays] state of the ray's first sample, for TraverseWrite to begin at
  T* ends;          // [n_rays] end of the last sample that the limit allows, or t_far

  DFF_HD void operator()(int64_t ray) const {
    const RayTraverser<T> traverser(rays, ray);
    int32_t count = 0;
    T first = 0;
    T end = traverser.t_far();
    traverser.each_sample(traverser.first(), [&](T state, T, T sample_end) {
      if (count++ == 0) first = state;
      if (count < rays.limit) return true;
      end = sample_end;
      return false;
    });
    counts[ray] = count;
    firsts[ray] = first;
    ends[ray] = end;
  }
};

template <typename T>
struct TraverseWrite {
  TraverseRays<T> rays;
  const T* firsts;         // [n_rays]
  const int32_t* offsets;  // [n_rays + 1] prefix sum of the counts
  T* t_starts;             // [n_samples]
  T* t_ends;               // [n_samples]
  int32_t* ray_indices;    // [n_samples]

  DFF_HD void operator()(int64_t ray) const {
    int64_t slot = offsets[ray];
    const int64_t end = offsets[ray + 1];
    if (slot >= end) return;
    RayTraverser<T>(rays, ray).each_sample(firsts[ray], [&](T, T sample_start, T sample_end) {
      t_starts[slot] = sample_start;
      t_ends[slot] = sample_end;
      ray_indices[slot] = static_cast<int32_t>(ray);
      return ++slot < end;
    });
  }
};

DFF_LAUNCHER(Status traverse_blocks(const TraverseBlocks& op, const Launch& launch);)
DFF_LAUNCHER(template <typename T> Status traverse_count(const TraverseCount<T>& op, const Launch& launch);)
DFF_LAUNCHER(template <typename T> Status traverse_write(const TraverseWrite<T>& op, const Launch& launch);)

}  // namespace dff
