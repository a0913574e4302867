#include "dreamfusion_fast/composite.h"

#include "parallel.h"

namespace dff::cpu {

constexpr int64_t kRaysPerPiece = 64;  // some 1500 samples: tens of microseconds

template <typename Scalar>
Status composite_forward(const CompositeForward<Scalar>& op, const Launch& launch) {
  return composite_as_asked(op, [&](auto absorption, auto only_weights) {
    const auto composite = [&op](int64_t ray) {
      composite_forward_ray<decltype(absorption)::value, decltype(only_weights)::value>(op, ray, SingleLane());
    };
    return for_each(op.n_rays, launch, composite, kRaysPerPiece);
  });
}

template <typename Scalar>
Status composite_backward(const CompositeBackward<Scalar>& op, const Launch& launch) {
  return composite_as_asked(op, [&](auto absorption, auto only_weights) {
    const auto composite = [&op](int64_t ray) {
      composite_backward_ray<decltype(absorption)::value, decltype(only_weights)::value>(op, ray, SingleLane());
    };
    return for_each(op.n_rays, launch, composite, kRaysPerPiece);
  });
}

DFF_FOR_FLOATS(composite_forward, CompositeForward);
DFF_FOR_FLOATS(composite_backward, CompositeBackward);

}  // namespace dff::cpu
