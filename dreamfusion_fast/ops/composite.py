"""Alpha compositing of packed samples along rays (Max 1995; NeRF, Mildenhall et al. 2020, eq. 3)."""

import torch
from torch import Tensor

# exp(-800) is zero in float32 and in float64: a sample this thick is opaque, and an infinite density stays free of inf - inf.
OPAQUE_DEPTH = 800.0


def composite_reference(
    density: Tensor, values: Tensor, t: Tensor, step: float, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pure-PyTorch twin of :func:`composite`: any float dtype, any device, differentiable to density and values."""
    n_rays, n_samples = offsets.numel() - 1, density.numel()
    starts = offsets.long()
    ray = torch.repeat_interleave(
        torch.arange(n_rays, device=density.device), starts.diff(), output_size=n_samples
    )
    optical = (density * step).clamp(max=OPAQUE_DEPTH)
    # One running sum over all rays, less its value where the ray starts; in float64, because the sum outgrows the ray's.
    inclusive = torch.cumsum(optical.double(), 0)
    before_ray = torch.cat([inclusive.new_zeros(1), inclusive])[starts[:-1]]
    before = (inclusive - optical.double() - before_ray[ray]).to(density.dtype)
    weights = torch.exp(-before) * -torch.expm1(-optical)
    opacity = weights.new_zeros(n_rays).index_add(0, ray, weights)
    depth = weights.new_zeros(n_rays).index_add(0, ray, weights * t)
    accumulated = values.new_zeros(n_rays, values.shape[1]).index_add(0, ray, weights.unsqueeze(1) * values)
    return weights, opacity, depth, accumulated
