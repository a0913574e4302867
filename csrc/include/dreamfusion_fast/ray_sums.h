// The streaming renderer's own part: from what the network says of one tile's samples to per-ray sums, and back.
//
// A tile is a window first <= i < first + capacity of the packed samples, wherever it cuts the rays. Tiles are taken in
// order, so a ray that began in the tile before goes on from its sums; at most one ray crosses a given cut. Backward
// takes the tiles in the opposite order, from a state kept for each cut: the optical depth and the depth in front of it
// (`prefix`, from forward) and the sum of gradient times weight behind it (`suffix`).
//
// Per sample (DreamFusion, section 3.1): density = activation(logit + blob) inside the bound, albedo = sigmoid(logits),
// normal = -G / |G| with G the gradient of (logit + blob) by the position, colour by the shading. In Python these are
// in dreamfusion_fast/ops/sample_head.py, and tests/ops/tiles/test_ray_sums_tile.py compares.
//
// Per ray, with weights w as in composite.h:
//   optical depth, sum w colour, sum w t, sum w normal, and last sum w x of what else the network says,
//   orientation  sum sg(w) max(0, normal . direction)^2               (Ref-NeRF, Verbin et al. 2022, eq. 11)
//   distortion   sum_ij w_i w_j |t_i - t_j| + 1/3 sum w_i^2 length_i  (mip-NeRF 360, Barron et al. 2022, eq. 15)
//   entropy      sum -w log w - (1 - w) log(1 - w)                    (in nats; w clamped to [1e-5, 1 - 1e-5])
#pragma once

#include "dreamfusion_fast/composite.h"
#include "dreamfusion_fast/view.h"

namespace dff {

// Columns of the per-ray sums.
constexpr int kOpticalDepth = 0;
constexpr int kColor = 1;
constexpr int kDepth = 4;
constexpr int kNormal = 5;
constexpr int kOrientation = 8;
constexpr int kDistortion = 9;
constexpr int kEntropy = 10;
constexpr int kSums = 11;  // the network's other channels follow

// What is kept for each cut between tiles.
constexpr int kPrefix = 2;  // optical depth and sum w t in front of it

enum class DensityActivation : int32_t { kSoftplus = 0, kExp = 1 };
enum class SampleShading : int32_t { kAlbedo = 0, kLambertian = 1, kTextureless = 2 };

// How the network's outputs become density, colour and normal; the same for all samples of a render.
template <typename T>
struct SampleHead {
  T centre[3];  // of the scene box
  T extent[3];  // of the scene box
  DensityActivation activation;
  T blob_scale;  // height of the density blob; 0: none
  T blob_width;  // its standard deviation (exp) or the radius where it is zero (softplus)
  bool ball;     // density lives in the inscribed ball, not in the whole box
  SampleShading shading;
  T ambient;
  T diffuse;
  const T* light;        // [3] or [n_rays, 3]; unused with albedo shading
  int64_t light_stride;  // 0 or 3
};

template <typename T>
struct SampleTile {
  const int32_t* offsets;    // [n_rays + 1], first sample of each ray
  const int32_t* ray_range;  // [2], the rays with samples in this tile: first, and one past the last
  const T* directions;       // [n_rays, 3]
  const T* t;                // [capacity], distance along the ray
  const T* lengths;          // [capacity], or null: all `step`
  View<const T> positions;   // [capacity, 3] in the scene box scaled to [0, 1]^3
  View<const T> logits;      // [capacity, 4 + n_channels], density, albedo, others
  View<const T> slopes;      // [capacity, 3], gradient of the density logit by `positions`; empty: no normals
  int64_t n_rays;
  int64_t first;
  int64_t capacity;
  T step;
  int64_t n_channels;

  DFF_HD int64_t n_sums() const { return kSums + n_channels; }

  // The samples low <= i < high of a ray lie in this tile, and others before or after it.
  struct Part {
    int64_t low, high;
    bool begins_before, ends_after;
  };
  DFF_HD Part part(int64_t ray) const {
    const int64_t begin = offsets[ray], end = offsets[ray + 1], stop = first + capacity;
    return {begin > first ? begin : first, end < stop ? end : stop, begin<first, end> stop};
  }
  DFF_HD T length(int64_t slot) const { return lengths != nullptr ? lengths[slot] : step; }
};

template <typename T>
struct RaySumsForward {
  SampleHead<T> head;
  SampleTile<T> tile;
  T* sums;          // [n_rays, n_sums], zero before the first tile
  T* prefix;        // [kPrefix], out, for the cut at `first` if a ray crosses it
  bool distortion;  // whether to compute it; it takes a scan of its own
  bool entropy;     // whether to compute it; it takes two logarithms
};

template <typename T>
struct RaySumsBackward {
  SampleHead<T> head;
  SampleTile<T> tile;
  const T* sums;          // [n_rays, n_sums], after the last tile
  const T* grad_sums;     // [n_rays, n_sums]
  const T* prefix;        // [kPrefix]
  const T* suffix_after;  // [1], for the cut at the tile's end; read if a ray crosses it
  T* suffix;              // [1], out, for the cut at `first` if a ray crosses it
  View<T> grad_logits;    // [capacity, 4 + n_channels], out
  View<T> grad_slopes;    // [capacity, 3], out; empty without normals
  bool distortion;
  bool entropy;
};

// Which samples of each ray come before less than exp(-limit) of the light is left, and are of an optical depth of
// `least` themselves. Without the latter they are the first ones of the ray, and their number says all.
template <typename T>
struct RaySumsVisible {
  SampleHead<T> head;
  SampleTile<T> tile;  // of `logits` only the density is read, slopes are not
  T* depths;           // [n_rays], optical depth so far, zero before the first tile
  int32_t* counts;     // [n_rays], visible samples so far, zero before the first tile
  uint8_t* kept;       // [all samples], out: whether each is visible; nullptr: least is 0
  T limit;
  T least;
};

// Above this, softplus is the identity to float64's rounding (torch.nn.functional.softplus).
constexpr double kSoftplusLinear = 20.0;
// exp(15) = 3.3e6 per scene unit: opaque within any step; more only risks overflow.
constexpr double kMaxExponent = 15.0;
// Keeps the softplus blob's second derivatives finite at the centre.
constexpr double kBlobCentreEps = 1e-10;
// Below this length a gradient of the density logit has no meaningful direction.
constexpr double kShortestSlope = 1e-4;
constexpr double kEntropyEps = 1e-5;

template <typename T>
DFF_HD T sigmoid(T x) {
  return T(1) / (T(1) + std::exp(-x));
}

// One sample: what the network says, and what of it backward needs.
template <typename T>
struct SampleState {
  T density;
  T density_slope;  // d density / d logit
  T albedo[3];
  T color[3];
  T normal[3];    // zero without normals
  T gradient[3];  // G of the header
  T inverse_length;
  bool straight;  // G is long enough to be normalised: its length has a gradient
  T lit;
  T towards[3];  // unit vector to the light
  bool facing;   // the light
};

template <typename T>
DFF_HD T sample_density(const SampleHead<T>& head, const SampleTile<T>& tile, int64_t slot, T (&offset)[3], T* blob,
                        T* slope) {
  T squared = 0, centred_squared = 0;
  bool inside = true;
  for (int axis = 0; axis < 3; ++axis) {
    const T unit = tile.positions(slot, axis);
    const T centred = T(2) * unit - T(1);
    centred_squared += centred * centred;
    inside = inside && centred <= T(1) && centred >= T(-1);
    offset[axis] = (unit - T(0.5)) * head.extent[axis];
    squared += offset[axis] * offset[axis];
  }
  if (head.ball) inside = centred_squared <= T(1);
  const bool exponential = head.activation == DensityActivation::kExp;
  *blob = 0;
  if (head.blob_scale != T(0)) {
    *blob = exponential ? head.blob_scale * std::exp(squared * (T(-0.5) / (head.blob_width * head.blob_width)))
                        : head.blob_scale * (T(1) - std::sqrt(squared + T(kBlobCentreEps)) / head.blob_width);
  }
  const T raw = tile.logits(slot, 0) + *blob;
  T density;
  if (exponential) {
    density = std::exp(raw < T(kMaxExponent) ? raw : raw != raw ? raw : T(kMaxExponent));
    *slope = density;  // also where it is saturated, so that a runaway density can come back
  } else {
    density = raw > T(kSoftplusLinear) ? raw : std::log1p(std::exp(raw));
    *slope = sigmoid(raw);
  }
  if (!inside) {
    density = 0;
    *slope = 0;
  }
  return density;
}

template <typename T>
DFF_HD SampleState<T> sample_state(const SampleHead<T>& head, const SampleTile<T>& tile, int64_t slot, int64_t ray) {
  SampleState<T> s;
  T offset[3], blob;
  s.density = sample_density(head, tile, slot, offset, &blob, &s.density_slope);
  for (int c = 0; c < 3; ++c) {
    s.albedo[c] = sigmoid(tile.logits(slot, 1 + c));
    s.color[c] = s.albedo[c];
    s.normal[c] = 0;
    s.towards[c] = 0;
    s.gradient[c] = 0;
  }
  s.lit = 1;
  s.facing = false;
  s.straight = false;
  s.inverse_length = 0;
  if (tile.slopes.empty()) return s;

  T squared = 0;
  T factor = 0;  // the blob's gradient is factor * offset
  if (head.blob_scale != T(0)) {
    if (head.activation == DensityActivation::kExp) {
      factor = -blob / (head.blob_width * head.blob_width);
    } else {
      const T distance = offset[0] * offset[0] + offset[1] * offset[1] + offset[2] * offset[2];
      factor = -head.blob_scale / (head.blob_width * std::sqrt(distance + T(kBlobCentreEps)));
    }
  }
  for (int axis = 0; axis < 3; ++axis) {
    s.gradient[axis] = tile.slopes(slot, axis) / head.extent[axis] + factor * offset[axis];
    squared += s.gradient[axis] * s.gradient[axis];
  }
  const T shortest = T(kShortestSlope * kShortestSlope);
  s.straight = squared >= shortest;
  s.inverse_length = T(1) / std::sqrt(squared < shortest ? shortest : squared);
  for (int axis = 0; axis < 3; ++axis) s.normal[axis] = -s.gradient[axis] * s.inverse_length;
  if (head.shading == SampleShading::kAlbedo) return s;

  const T* light = head.light + ray * head.light_stride;
  T distance = 0;
  for (int axis = 0; axis < 3; ++axis) {
    s.towards[axis] = light[axis] - (head.centre[axis] + offset[axis]);
    distance += s.towards[axis] * s.towards[axis];
  }
  distance = std::sqrt(distance);
  const T scale = T(1) / (distance > T(1e-12) ? distance : T(1e-12));
  T cosine = 0;
  for (int axis = 0; axis < 3; ++axis) {
    s.towards[axis] *= scale;
    cosine += s.normal[axis] * s.towards[axis];
  }
  s.facing = cosine > T(0);
  s.lit = head.ambient + head.diffuse * (cosine > T(0) || cosine != cosine ? cosine : T(0));
  for (int c = 0; c < 3; ++c) {
    s.color[c] = head.shading == SampleShading::kTextureless ? s.lit : s.albedo[c] * s.lit;
  }
  return s;
}

// The gradients of colour and normal to the logits of the albedo and to the slopes.
template <typename T>
DFF_HD void sample_state_backward(const SampleHead<T>& head, const SampleState<T>& s, const T (&grad_color)[3],
                                  const T (&grad_normal)[3], T (&grad_albedo_logits)[3], T (&grad_slopes)[3]) {
  T normal[3] = {grad_normal[0], grad_normal[1], grad_normal[2]};
  const bool textureless = head.shading == SampleShading::kTextureless;
  T to_lit = 0;
  for (int c = 0; c < 3; ++c) {
    const T to_albedo = textureless ? T(0) : grad_color[c] * s.lit;
    grad_albedo_logits[c] = to_albedo * s.albedo[c] * (T(1) - s.albedo[c]);
    to_lit += textureless ? grad_color[c] : grad_color[c] * s.albedo[c];
  }
  if (head.shading != SampleShading::kAlbedo && s.facing) {
    for (int axis = 0; axis < 3; ++axis) normal[axis] += to_lit * head.diffuse * s.towards[axis];
  }
  // normal = -G / |G|: its gradient is what is left of -g / |G| across the normal.
  const T along = s.normal[0] * normal[0] + s.normal[1] * normal[1] + s.normal[2] * normal[2];
  for (int axis = 0; axis < 3; ++axis) {
    const T across = s.straight ? normal[axis] - s.normal[axis] * along : normal[axis];
    grad_slopes[axis] = -across * s.inverse_length / head.extent[axis];
  }
}

template <typename T>
DFF_HD T sample_entropy(T weight) {
  const T low = T(kEntropyEps), high = T(1.0 - kEntropyEps);
  const T w = weight < low ? low : weight > high ? high : weight;
  return -(w * std::log(w) + (T(1) - w) * std::log1p(-w));
}

template <typename T>
DFF_HD T sample_entropy_slope(T weight) {
  const bool clamped = weight < T(kEntropyEps) || weight > T(1.0 - kEntropyEps);
  return clamped ? T(0) : std::log1p(-weight) - std::log(weight);
}

// max(0, normal . direction): how far a sample's normal points away from the camera.
template <typename T>
DFF_HD T facing_away(const SampleState<T>& s, const T* direction) {
  const T cosine = s.normal[0] * direction[0] + s.normal[1] * direction[1] + s.normal[2] * direction[2];
  return cosine > T(0) || cosine != cosine ? cosine : T(0);
}

template <typename T, typename Group>
DFF_HD void ray_sums_forward_ray(const RaySumsForward<T>& p, int64_t ray, const Group& group) {
  const SampleTile<T>& tile = p.tile;
  const typename SampleTile<T>::Part part = tile.part(ray);
  const int64_t low = part.low, high = part.high;
  if (low >= high) return;
  T* sums = p.sums + ray * tile.n_sums();
  T passed = 0;        // optical depth in front of this chunk
  T depth_before = 0;  // sum w t in front of it
  if (part.begins_before) {
    passed = sums[kOpticalDepth];
    depth_before = sums[kDepth];
    if (group.lane() == 0) {
      p.prefix[0] = passed;
      p.prefix[1] = depth_before;
    }
  }
  const bool normals = !tile.slopes.empty();
  T added[kSums] = {};
  for (int64_t chunk = low; chunk < high; chunk += Group::kWidth) {
    const int64_t i = chunk + group.lane();
    const bool active = i < high;
    const int64_t slot = (active ? i : high - 1) - tile.first;
    const SampleState<T> s = sample_state(p.head, tile, slot, ray);
    const T length = tile.length(slot);
    const T tau = active ? s.density * length : T(0);
    T total;
    const T before = passed + group.exclusive_sum(tau, &total);
    passed += total;
    const T weight = active ? std::exp(-before) * -std::expm1(-tau) : T(0);
    const T t = tile.t[slot];
    if (p.distortion) {
      T depth_total;
      const T in_front = depth_before + group.exclusive_sum(weight * t, &depth_total);
      depth_before += depth_total;
      added[kDistortion] += T(2) * weight * (t * -std::expm1(-before) - in_front) + weight * weight * length / T(3);
    }
    for (int64_t c = 0; c < tile.n_channels; ++c) {
      const T sum = group.sum(weight * tile.logits(slot, 4 + c));
      if (group.lane() == 0) sums[kSums + c] += sum;
    }
    if (!active) continue;
    added[kDepth] += weight * t;
    if (p.entropy) added[kEntropy] += sample_entropy(weight);
    for (int c = 0; c < 3; ++c) added[kColor + c] += weight * s.color[c];
    if (normals) {
      for (int c = 0; c < 3; ++c) added[kNormal + c] += weight * s.normal[c];
      const T away = facing_away(s, tile.directions + 3 * ray);
      added[kOrientation] += weight * away * away;
    }
  }
  for (int k = 1; k < kSums; ++k) added[k] = group.sum(added[k]);
  if (group.lane() == 0) {
    sums[kOpticalDepth] = passed;
    for (int k = 1; k < kSums; ++k) sums[k] += added[k];
  }
}

template <typename T, typename Group>
DFF_HD void ray_sums_backward_ray(const RaySumsBackward<T>& p, int64_t ray, const Group& group) {
  const SampleTile<T>& tile = p.tile;
  const typename SampleTile<T>::Part part = tile.part(ray);
  const int64_t low = part.low, high = part.high;
  if (low >= high) return;
  const T* sums = p.sums + ray * tile.n_sums();
  const T* grad = p.grad_sums + ray * tile.n_sums();
  const T* direction = tile.directions + 3 * ray;
  const bool normals = !tile.slopes.empty();

  // First pass, front to back: what lies in front of each sample, left in the output that the second pass overwrites.
  T passed = part.begins_before ? p.prefix[0] : T(0);
  T depth_before = part.begins_before ? p.prefix[1] : T(0);
  for (int64_t chunk = low; chunk < high; chunk += Group::kWidth) {
    const int64_t i = chunk + group.lane();
    const bool active = i < high;
    const int64_t slot = (active ? i : high - 1) - tile.first;
    T offset[3], blob, slope;
    const T density = sample_density(p.head, tile, slot, offset, &blob, &slope);
    const T tau = active ? density * tile.length(slot) : T(0);
    T total;
    const T before = passed + group.exclusive_sum(tau, &total);
    passed += total;
    if (active) p.grad_logits(slot, 0) = before;
    if (p.distortion) {
      const T weight = active ? std::exp(-before) * -std::expm1(-tau) : T(0);
      T depth_total;
      const T in_front = depth_before + group.exclusive_sum(weight * tile.t[slot], &depth_total);
      depth_before += depth_total;
      if (active) p.grad_logits(slot, 1) = in_front;
    }
  }
  group.sync();  // the second pass goes the other way: each lane reads what another one wrote

  const T all_weight = -std::expm1(-sums[kOpticalDepth]);
  T behind = part.ends_after ? *p.suffix_after : T(0);  // sum of gradient * weight behind this chunk
  for (int64_t chunk = high; chunk > low; chunk -= Group::kWidth) {
    const int64_t i = chunk - 1 - group.lane();
    const bool active = i >= low;
    const int64_t slot = (active ? i : low) - tile.first;
    const SampleState<T> s = sample_state(p.head, tile, slot, ray);
    const T length = tile.length(slot), t = tile.t[slot];
    const T tau = s.density * length;
    const T before = p.grad_logits(slot, 0);
    const T weight = std::exp(-before) * -std::expm1(-tau);
    T to_weight = grad[kDepth] * t;
    if (p.entropy) to_weight += grad[kEntropy] * sample_entropy_slope(weight);
    T to_color[3], to_normal[3] = {};
    for (int c = 0; c < 3; ++c) {
      to_weight += grad[kColor + c] * s.color[c];
      to_color[c] = grad[kColor + c] * weight;
    }
    if (normals) {
      // The orientation loss takes the weight as given: it turns normals and moves no density.
      const T away = T(2) * grad[kOrientation] * weight * facing_away(s, direction);
      for (int c = 0; c < 3; ++c) {
        to_weight += grad[kNormal + c] * s.normal[c];
        to_normal[c] = grad[kNormal + c] * weight + away * direction[c];
      }
    }
    if (p.distortion) {
      const T weight_before = -std::expm1(-before), in_front = p.grad_logits(slot, 1);
      const T weight_behind = all_weight - weight_before - weight, behind_depth = sums[kDepth] - in_front - weight * t;
      to_weight += grad[kDistortion] * T(2) *
                   (t * (weight_before - weight_behind) - in_front + behind_depth + weight * length / T(3));
    }
    for (int64_t c = 0; c < tile.n_channels; ++c) {
      to_weight += grad[kSums + c] * tile.logits(slot, 4 + c);
      if (active) p.grad_logits(slot, 4 + c) = grad[kSums + c] * weight;
    }
    T total;
    const T after = behind + group.exclusive_sum(active ? to_weight * weight : T(0), &total);
    behind += total;
    if (!active) continue;
    const T to_tau = std::exp(-(before + tau)) * to_weight - after + grad[kOpticalDepth];
    T to_albedo[3], to_slopes[3];
    sample_state_backward(p.head, s, to_color, to_normal, to_albedo, to_slopes);
    p.grad_logits(slot, 0) = to_tau * length * s.density_slope;
    for (int c = 0; c < 3; ++c) p.grad_logits(slot, 1 + c) = to_albedo[c];
    if (normals) {
      for (int axis = 0; axis < 3; ++axis) p.grad_slopes(slot, axis) = to_slopes[axis];
    }
  }
  if (part.begins_before && group.lane() == 0) *p.suffix = behind;
}

template <typename T, typename Group>
DFF_HD void ray_sums_visible_ray(const RaySumsVisible<T>& p, int64_t ray, const Group& group) {
  const SampleTile<T>& tile = p.tile;
  const typename SampleTile<T>::Part part = tile.part(ray);
  const int64_t low = part.low, high = part.high;
  if (low >= high) return;
  T passed = part.begins_before ? p.depths[ray] : T(0);
  int32_t visible = 0;
  for (int64_t chunk = low; chunk < high; chunk += Group::kWidth) {
    const int64_t i = chunk + group.lane();
    const bool active = i < high;
    const int64_t slot = (active ? i : high - 1) - tile.first;
    T offset[3], blob, slope;
    const T density = sample_density(p.head, tile, slot, offset, &blob, &slope);
    const T depth = active ? density * tile.length(slot) : T(0);
    T total;
    const T before = passed + group.exclusive_sum(depth, &total);
    passed += total;
    // Not "at most": a NaN stays visible, so that it is seen.
    const bool seen = active && !(before > p.limit) && !(depth < p.least);
    if (seen) ++visible;
    if (active && p.kept != nullptr) p.kept[i] = seen;
  }
  visible = group.sum(visible);
  if (group.lane() == 0) {
    p.depths[ray] = passed;
    p.counts[ray] += visible;
  }
}

DFF_LAUNCHER(template <typename T> Status ray_sums_forward(const RaySumsForward<T>& op, const Launch& launch);
             template <typename T> Status ray_sums_backward(const RaySumsBackward<T>& op, const Launch& launch);
             template <typename T> Status ray_sums_visible(const RaySumsVisible<T>& op, const Launch& launch);)

}  // namespace dff
