#include "dreamfusion_fast/composite.h"

#include "parallel.h"

namespace dff::cpu {

namespace {

constexpr int64_t kRaysPerPiece = 64;  // some 1500 samples: tens of microseconds

template <bool kLengths, typename Scalar>
Status forward(const CompositeForward<Scalar>& op, const Launch& launch) {
  return for_each(
      op.n_rays, launch, [&op](int64_t ray) { composite_forward_ray<kLengths>(op, ray, SingleLane()); }, kRaysPerPiece);
}

template <bool kLengths, typename Scalar>
Status backward(const CompositeBackward<Scalar>& op, const Launch& launch) {
  return for_each(
      op.n_rays, launch, [&op](int64_t ray) { composite_backward_ray<kLengths>(op, ray, SingleLane()); },
      kRaysPerPiece);
}

}  // namespace

template <typename Scalar>
Status composite_forward(const CompositeForward<Scalar>& op, const Launch& launch) {
  return op.lengths != nullptr ? forward<true>(op, launch) : forward<false>(op, launch);
}

template <typename Scalar>
Status composite_backward(const CompositeBackward<Scalar>& op, const Launch& launch) {
  return op.lengths != nullptr ? backward<true>(op, launch) : backward<false>(op, launch);
}

DFF_FOR_FLOATS(composite_forward, CompositeForward);
DFF_FOR_FLOATS(composite_backward, CompositeBackward);

}  // namespace dff::cpu
