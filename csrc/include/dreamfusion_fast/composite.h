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
#pragma once

#include "dreamfusion_fast/common.h"

namespace dff {

template <typename Scalar>
struct CompositeForward {
  const Scalar* density;   // [n_samples], may be infinite; below 0 counts as 0
  const Scalar* values;    // [n_samples, n_channels]
  const Scalar* t;         // [n_samples], distance along the ray
  const int32_t* offsets;  // [n_rays + 1], first sample of each ray
  Scalar* weights;         // [n_samples], out
  Scalar* opacity;         // [n_rays], out
  Scalar* depth;           // [n_rays], out
  Scalar* accumulated;     // [n_rays, n_channels], out
  int64_t n_rays;
  int64_t n_samples;
  int64_t n_channels;
  const Scalar* lengths;  // [n_samples], length of each sample; nullptr: all have the same, step
  Scalar step;
};

template <typename Scalar>
struct CompositeBackward {
  const Scalar* density;           // [n_samples]
  const Scalar* values;            // [n_samples, n_channels]
  const Scalar* t;                 // [n_samples]
  const int32_t* offsets;          // [n_rays + 1]
  const Scalar* weights;           // [n_samples], from the forward pass
  const Scalar* grad_weights;      // [n_samples], or null for zero
  const Scalar* grad_opacity;      // [n_rays], or null
  const Scalar* grad_depth;        // [n_rays], or null
  const Scalar* grad_accumulated;  // [n_rays, n_channels], or null
  Scalar* grad_density;            // [n_samples], out; between the passes, T_{i+1} or -1
  Scalar* grad_values;             // [n_samples, n_channels], out
  int64_t n_rays;
  int64_t n_samples;
  int64_t n_channels;
  const Scalar* lengths;  // [n_samples], or null: step
  Scalar step;
};

// A group of lanes works on one ray: a warp on the GPU, this single lane on the CPU. A group offers its width, the
// lane's number, the sum of a value over the lanes before (exclusive) with the total, the total alone, and a barrier
// that makes the lanes' writes visible to each other.
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
  DFF_HD void sync() const {}
};

// The offsets of a march that found more samples than its buffer holds end behind the buffer. On a GPU nobody has
// looked.
DFF_HD int64_t composite_end(int64_t offset, int64_t n_samples) { return offset < n_samples ? offset : n_samples; }

// Whether samples have lengths of their own is a template argument: decided per sample, it changes how the compiler
// fuses the operations of the common case, and so its last bits.
template <bool kLengths, typename Params>
DFF_HD auto sample_length(const Params& p, int64_t i) {
  return kLengths ? p.lengths[i] : p.step;
}

template <bool kLengths, typename Params>
DFF_HD auto optical_depth(const Params& p, int64_t i) {
  const auto density = p.density[i];
  return (density < 0 ? 0 : density) * sample_length<kLengths>(p, i);  // a NaN stays one
}

// Channels are summed this many at a time, so that any number of them fits into registers.
constexpr int kCompositeChannels = 4;

template <bool kLengths, typename Scalar, typename Group>
DFF_HD void composite_forward_ray(const CompositeForward<Scalar>& p, int64_t ray, const Group& group) {
  const int64_t begin = p.offsets[ray];
  const int64_t end = composite_end(p.offsets[ray + 1], p.n_samples);
  Scalar passed = 0;  // optical depth of the chunks before this one
  Scalar depth = 0;
  for (int64_t chunk = begin; chunk < end; chunk += Group::kWidth) {
    const int64_t i = chunk + group.lane();
    const Scalar tau = i < end ? optical_depth<kLengths>(p, i) : Scalar(0);
    Scalar total;
    const Scalar before = passed + group.exclusive_sum(tau, &total);
    passed += total;
    if (i < end) {
      const Scalar weight = std::exp(-before) * -std::expm1(-tau);
      p.weights[i] = weight;
      depth += weight * p.t[i];
    }
  }
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
// difference of two large numbers.
template <bool kLengths, typename Scalar, typename Group>
DFF_HD void composite_backward_ray(const CompositeBackward<Scalar>& p, int64_t ray, const Group& group) {
  const int64_t begin = p.offsets[ray];
  const int64_t end = composite_end(p.offsets[ray + 1], p.n_samples);
  Scalar passed = 0;
  for (int64_t chunk = begin; chunk < end; chunk += Group::kWidth) {
    const int64_t i = chunk + group.lane();
    const Scalar tau = i < end ? optical_depth<kLengths>(p, i) : Scalar(0);
    Scalar total;
    const Scalar before = passed + group.exclusive_sum(tau, &total);
    passed += total;
    // The sign tells the second pass of a density below 0, which need not read it again.
    if (i < end) p.grad_density[i] = p.density[i] < Scalar(0) ? Scalar(-1) : std::exp(-(before + tau));
  }
  group.sync();  // the second pass walks backwards: each lane reads what another one wrote

  const Scalar from_opacity = p.grad_opacity != nullptr ? p.grad_opacity[ray] * std::exp(-passed) : Scalar(0);
  const Scalar grad_depth = p.grad_depth != nullptr ? p.grad_depth[ray] : Scalar(0);
  const Scalar* grad_sums = p.grad_accumulated != nullptr ? p.grad_accumulated + ray * p.n_channels : nullptr;
  Scalar behind = 0;  // sum of g_j weight_j over the chunks behind this one
  for (int64_t chunk = end; chunk > begin; chunk -= Group::kWidth) {
    const int64_t i = chunk - 1 - group.lane();
    Scalar grad = 0;
    Scalar weight = 0;
    if (i >= begin) {
      weight = p.weights[i];
      grad = grad_depth * p.t[i];
      if (p.grad_weights != nullptr) grad += p.grad_weights[i];
      for (int64_t c = 0; c < p.n_channels; ++c) {
        const Scalar grad_sum = grad_sums != nullptr ? grad_sums[c] : Scalar(0);
        grad += grad_sum * p.values[i * p.n_channels + c];
        p.grad_values[i * p.n_channels + c] = grad_sum * weight;
      }
    }
    Scalar total;
    const Scalar suffix = behind + group.exclusive_sum(grad * weight, &total);
    behind += total;
    if (i >= begin) {
      const Scalar passing = p.grad_density[i];
      const Scalar to_density = sample_length<kLengths>(p, i) * (passing * grad - suffix + from_opacity);
      p.grad_density[i] = passing < Scalar(0) ? Scalar(0) : to_density;
    }
  }
}

DFF_LAUNCHER(template <typename Scalar>
             Status composite_forward(const CompositeForward<Scalar>& op, const Launch& launch);
             template <typename Scalar>
             Status composite_backward(const CompositeBackward<Scalar>& op, const Launch& launch);)

}  // namespace dff
