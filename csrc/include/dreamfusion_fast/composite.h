// Alpha compositing of packed samples along rays, forward and backward (Max 1995; Mildenhall et al. 2020, eq. 3).
//
// With optical depth tau_i = density_i * length_i and transmittance T_i = exp(-sum_{j<i} tau_j):
//   weight_i = T_i (1 - exp(-tau_i)), opacity = sum weight, depth = sum weight * t, accumulated = sum weight * values.
//
// T is the exponential of a running sum, not a running product of (1 - alpha): alpha rounded near 1 has lost what is
// left of the light, the sum keeps it, its error in T is bounded (T * tau * eps peaks at tau = 1), and lanes can scan a
// sum. An infinite density is an opaque sample: exp(-inf) = 0 everywhere, and nothing here subtracts two optical
// depths. A negative density counts as none, and gets no gradient: taken as it is, it makes light out of nothing, with
// weights below 0 and exp(-sum) as large as it likes. A clamp costs no more than a comparison, where a check on a GPU
// would have to wait.
//
// A sample may come with its alpha = 1 - exp(-tau) instead, of which tau = -log1p(-alpha) is the way back: infinite
// where it is 1. A product of (1 - alpha) would be quicker, but loses what is below a rounding of 1 once per sample.
#pragma once

#include <type_traits>

#include "dreamfusion_fast/common.h"

namespace dff {

// What tells how much a sample absorbs: its density and the length of all samples, its density and its own length, or
// its alpha.
enum class Absorption { kStep, kLength, kAlpha };

template <typename Scalar>
struct CompositeForward {
  const Scalar* density;   // [n_samples], may be infinite; below 0 counts as 0. With alphas: alpha, above 1 counts as 1
  const Scalar* values;    // [n_samples, n_channels]
  const Scalar* t;         // [n_samples], distance along the ray; unused with only_weights
  const int32_t* offsets;  // [n_rays + 1], first sample of each ray
  Scalar* weights;         // [n_samples], out
  Scalar* opacity;         // [n_rays], out
  Scalar* depth;           // [n_rays], out
  Scalar* accumulated;     // [n_rays, n_channels], out
  Scalar* transmittance;   // [n_samples], out: T before each sample; with only_weights, in place of the three above
  int64_t n_rays;
  int64_t n_samples;
  int64_t n_channels;     // 0 with only_weights
  const Scalar* lengths;  // [n_samples], length of each sample, 0 or more; nullptr: all have the same, step
  Scalar step;            // unused with alphas
  bool alphas;
  bool only_weights;
};

template <typename Scalar>
struct CompositeBackward {
  const Scalar* density;             // [n_samples], or alpha
  const Scalar* values;              // [n_samples, n_channels]
  const Scalar* t;                   // [n_samples]
  const int32_t* offsets;            // [n_rays + 1]
  const Scalar* weights;             // [n_samples], from the forward pass
  const Scalar* transmittance;       // [n_samples], from the forward pass; with only_weights
  const Scalar* grad_weights;        // [n_samples], or null for zero
  const Scalar* grad_opacity;        // [n_rays], or null
  const Scalar* grad_depth;          // [n_rays], or null
  const Scalar* grad_accumulated;    // [n_rays, n_channels], or null
  const Scalar* grad_transmittance;  // [n_samples], or null; with only_weights, in place of the three above
  Scalar* grad_density;              // [n_samples], out; between the passes T_{i+1}, of alphas T_i, or -1
  Scalar* grad_values;               // [n_samples, n_channels], out
  int64_t n_rays;
  int64_t n_samples;
  int64_t n_channels;
  const Scalar* lengths;  // [n_samples], or null: step
  Scalar step;
  bool alphas;
  bool only_weights;
};

// A group of lanes works on one ray: a warp on the GPU, this single lane on the CPU. A group offers its width, the
// lane's number, the sum of a value over the lanes before (exclusive) with the total, the total alone, what a value has
// become before this lane if each in turn makes scale * value + shift of it, and a barrier that makes the lanes' writes
// visible to each other.
struct SingleLane {
  static constexpr int kWidth = 1;
  DFF_HD int lane() const { return 0; }
  template <typename Scalar>
  DFF_HD Scalar exclusive_sum(Scalar value, Scalar* total) const {
    *total = value;
    return Scalar(0);
  }
  template <typename Scalar>
  DFF_HD Scalar sum(Scalar value) const {
    return value;
  }
  template <typename Scalar>
  DFF_HD Scalar exclusive_affine(Scalar scale, Scalar shift, Scalar start, Scalar* end) const {
    *end = scale * start + shift;
    return start;
  }
  DFF_HD void sync() const {}
};

// The offsets of a march that found more samples than its buffer holds end behind the buffer. On a GPU nobody has
// looked.
DFF_HD int64_t composite_end(int64_t offset, int64_t n_samples) { return offset < n_samples ? offset : n_samples; }

// How samples absorb is a template argument: decided per sample, it changes how the compiler fuses the operations of
// the common case, and so its last bits.
template <Absorption kAbsorption, typename Params>
DFF_HD auto sample_length(const Params& p, int64_t i) {
  return kAbsorption == Absorption::kLength ? p.lengths[i] : p.step;
}

template <typename Scalar>
DFF_HD Scalar clamped_alpha(Scalar alpha) {
  return alpha < 0 ? Scalar(0) : alpha > 1 ? Scalar(1) : alpha;  // a NaN stays one
}

template <Absorption kAbsorption, typename Params>
DFF_HD auto optical_depth(const Params& p, int64_t i) {
  const auto density = p.density[i];
  if constexpr (kAbsorption == Absorption::kAlpha) {
    return -std::log1p(-clamped_alpha(density));
  } else {
    const auto length = sample_length<kAbsorption>(p, i);
    // Nothing is absorbed over no length, whatever the density.
    const bool none = density < 0 || (kAbsorption == Absorption::kLength && length == 0);
    return (none ? 0 : density) * length;  // a NaN stays one
  }
}

// Which sample gets no gradient because it was clamped.
template <Absorption kAbsorption, typename Scalar>
DFF_HD bool clamped(Scalar density) {
  return density < Scalar(0) || (kAbsorption == Absorption::kAlpha && density > Scalar(1));
}

// Channels are summed this many at a time, so that any number of them fits into registers.
constexpr int kCompositeChannels = 4;

// kOnlyWeights: weights and transmittance come out, as op.only_weights tells, and nothing that is summed along the ray.
template <Absorption kAbsorption, bool kOnlyWeights, typename Scalar, typename Group>
DFF_HD void composite_forward_ray(const CompositeForward<Scalar>& p, int64_t ray, const Group& group) {
  const int64_t begin = p.offsets[ray];
  const int64_t end = composite_end(p.offsets[ray + 1], p.n_samples);
  Scalar passed = 0;  // optical depth of the chunks before this one
  Scalar depth = 0;
  for (int64_t chunk = begin; chunk < end; chunk += Group::kWidth) {
    const int64_t i = chunk + group.lane();
    const Scalar tau = i < end ? optical_depth<kAbsorption>(p, i) : Scalar(0);
    Scalar total;
    const Scalar before = passed + group.exclusive_sum(tau, &total);
    passed += total;
    if (i < end) {
      const Scalar reaching = std::exp(-before);
      const Scalar alpha = kAbsorption == Absorption::kAlpha ? clamped_alpha(p.density[i]) : -std::expm1(-tau);
      const Scalar weight = reaching * alpha;
      p.weights[i] = weight;
      if constexpr (kOnlyWeights) {
        p.transmittance[i] = reaching;
      } else {
        depth += weight * p.t[i];
      }
    }
  }
  if constexpr (kOnlyWeights) return;
  depth = group.sum(depth);
  if (group.lane() == 0) {
    p.opacity[ray] = -std::expm1(-passed);  // the sum of the weights in closed form: never above 1
    p.depth[ray] = depth;
  }
  for (int64_t first = 0; first < p.n_channels; first += kCompositeChannels) {
    const int count =
        static_cast<int>(p.n_channels - first < kCompositeChannels ? p.n_channels - first : kCompositeChannels);
    Scalar sums[kCompositeChannels] = {};
    for (int64_t i = begin + group.lane(); i < end; i += Group::kWidth) {
      const Scalar weight = p.weights[i];  // written by this very lane above
      const Scalar* value = p.values + i * p.n_channels + first;
      for (int c = 0; c < kCompositeChannels; ++c) {
        if (c < count) sums[c] += weight * value[c];
      }
    }
    for (int c = 0; c < kCompositeChannels; ++c) {
      if (c < count) {
        const Scalar sum = group.sum(sums[c]);
        if (group.lane() == 0) p.accumulated[ray * p.n_channels + first + c] = sum;
      }
    }
  }
}

// With g_i the gradient with respect to weight_i through weights, depth and accumulated:
//   d/d density_i = length_i * (T_{i+1} g_i - sum_{j>i} g_j weight_j + grad_opacity * T_end).
// Opacity is 1 - T_end, so its gradient is the same for every sample of a ray; put into g it would come out as the
// difference of two large numbers. A gradient h_j with respect to T_j adds h_j T_j to the sum over j > i.
//
// Alphas may be 1, and then nothing can be divided by 1 - alpha. With S_i the gradient with respect to T_i through all
// that is behind, samples i, i + 1, ... and opacity:
//   S_i = h_i + alpha_i g_i + (1 - alpha_i) S_{i+1}, S_end = -grad_opacity, d/d alpha_i = T_i (g_i - S_{i+1}).
template <Absorption kAbsorption, bool kOnlyWeights, typename Scalar, typename Group>
DFF_HD void composite_backward_ray(const CompositeBackward<Scalar>& p, int64_t ray, const Group& group) {
  constexpr bool kAlpha = kAbsorption == Absorption::kAlpha;
  const int64_t begin = p.offsets[ray];
  const int64_t end = composite_end(p.offsets[ray + 1], p.n_samples);
  Scalar passed = 0;
  for (int64_t chunk = begin; chunk < end; chunk += Group::kWidth) {
    const int64_t i = chunk + group.lane();
    const Scalar tau = i < end ? optical_depth<kAbsorption>(p, i) : Scalar(0);
    Scalar total;
    const Scalar before = passed + group.exclusive_sum(tau, &total);
    passed += total;
    // The sign tells the second pass of a sample that was clamped, which need not read it again.
    if (i < end) {
      p.grad_density[i] =
          clamped<kAbsorption>(p.density[i]) ? Scalar(-1) : std::exp(kAlpha ? -before : -(before + tau));
    }
  }
  group.sync();  // the second pass walks backwards: each lane reads what another one wrote

  const Scalar left = kAlpha ? Scalar(1) : std::exp(-passed);
  const Scalar from_opacity = p.grad_opacity != nullptr ? p.grad_opacity[ray] * left : Scalar(0);
  const Scalar grad_depth = p.grad_depth != nullptr ? p.grad_depth[ray] : Scalar(0);
  const Scalar* grad_sums = p.grad_accumulated != nullptr ? p.grad_accumulated + ray * p.n_channels : nullptr;
  // Of the chunks behind this one: S, or else the sum of g_j weight_j.
  Scalar behind = kAlpha ? -from_opacity : Scalar(0);
  for (int64_t chunk = end; chunk > begin; chunk -= Group::kWidth) {
    const int64_t i = chunk - 1 - group.lane();
    Scalar grad = 0;
    Scalar weight = 0;
    Scalar grad_reaching = 0;
    if (i >= begin) {
      weight = p.weights[i];
      if constexpr (kOnlyWeights) {
        if (p.grad_transmittance != nullptr) grad_reaching = p.grad_transmittance[i];
      } else {
        grad = grad_depth * p.t[i];
      }
      if (p.grad_weights != nullptr) grad += p.grad_weights[i];
      for (int64_t c = 0; c < p.n_channels; ++c) {
        const Scalar grad_sum = grad_sums != nullptr ? grad_sums[c] : Scalar(0);
        grad += grad_sum * p.values[i * p.n_channels + c];
        p.grad_values[i * p.n_channels + c] = grad_sum * weight;
      }
    }
    if constexpr (kAlpha) {
      const Scalar alpha = i >= begin ? clamped_alpha(p.density[i]) : Scalar(0);
      const Scalar after = group.exclusive_affine(1 - alpha, alpha * grad + grad_reaching, behind, &behind);
      if (i >= begin) {
        const Scalar reaching = p.grad_density[i];
        p.grad_density[i] = reaching < Scalar(0) ? Scalar(0) : reaching * (grad - after);
      }
    } else {
      Scalar share = grad * weight;
      if constexpr (kOnlyWeights) share += i >= begin ? grad_reaching * p.transmittance[i] : Scalar(0);
      Scalar total;
      const Scalar suffix = behind + group.exclusive_sum(share, &total);
      behind += total;
      if (i >= begin) {
        const Scalar passing = p.grad_density[i];
        const Scalar to_density = sample_length<kAbsorption>(p, i) * (passing * grad - suffix + from_opacity);
        p.grad_density[i] = passing < Scalar(0) ? Scalar(0) : to_density;
      }
    }
  }
}

// Calls run with the template arguments of both functions above that an op asks for.
template <typename Op, typename Run>
Status composite_as_asked(const Op& op, const Run& run) {
  const auto run_for = [&](auto absorption) {
    return op.only_weights ? run(absorption, std::true_type()) : run(absorption, std::false_type());
  };
  if (op.alphas) return run_for(std::integral_constant<Absorption, Absorption::kAlpha>());
  if (op.lengths != nullptr) return run_for(std::integral_constant<Absorption, Absorption::kLength>());
  return run_for(std::integral_constant<Absorption, Absorption::kStep>());
}

DFF_LAUNCHER(template <typename Scalar>
             Status composite_forward(const CompositeForward<Scalar>& op, const Launch& launch);
             template <typename Scalar>
             Status composite_backward(const CompositeBackward<Scalar>& op, const Launch& launch);)

}  // namespace dff
