#include "dreamfusion_fast/composite.h"

#include "parallel.h"

namespace dff {
namespace cpu {

namespace {
constexpr int64_t kRaysPerPiece = 64;  // some 1500 samples: tens of microseconds
}

template <typename Scalar>
Status composite_forward(const CompositeForward<Scalar>& op, const Launch& launch) {
  return for_each(
      op.n_rays, launch, [&op](int64_t ray) { composite_forward_ray(op, ray, SingleLane()); }, kRaysPerPiece);
}

template <typename Scalar>
Status composite_backward(const CompositeBackward<Scalar>& op, const Launch& launch) {
  return for_each(
      op.n_rays, launch, [&op](int64_t ray) { composite_backward_ray(op, ray, SingleLane()); }, kRaysPerPiece);
}

template Status composite_forward(const CompositeForward<float>&, const Launch&);
template Status composite_forward(const CompositeForward<double>&, const Launch&);
template Status composite_backward(const CompositeBackward<float>&, const Launch&);
template Status composite_backward(const CompositeBackward<double>&, const Launch&);

}  // namespace cpu
}  // namespace dff
