"""Contraction of unbounded space to a ball of radius 2 (mip-NeRF 360, Barron et al. 2022, equation 10)."""

from __future__ import annotations

import torch
from torch import Tensor


def contract(positions: Tensor) -> Tensor:
    """Leaves the unit ball as it is, and brings all of space beyond into the shell up to radius 2.

    A point x with |x| > 1 goes to (2 - 1 / |x|) x / |x|, which is once differentiable at |x| = 1.

    Args:
        positions: `[..., 3]`, in radii of what stays as it is, any floating-point dtype.
    """
    # In units of the largest coordinate, so that a far point's square does not overflow.
    unit = positions.detach().abs().amax(dim=-1, keepdim=True).clamp(min=1.0)
    scaled = positions / unit
    squared = scaled.square().sum(dim=-1, keepdim=True)
    inside = (unit == 1.0) & (squared.detach() <= 1.0)
    # Where it is not used, a length that has a gradient.
    length = torch.where(inside, torch.ones_like(squared), squared).sqrt()
    return torch.where(inside, positions, (2.0 - 1.0 / unit / length) * (scaled / length))


def uncontract(positions: Tensor) -> Tensor:
    """The inverse of :func:`contract`: `[..., 3]` of length below 2 to all of space; NaN where there is no inverse."""
    squared = positions.square().sum(dim=-1, keepdim=True)
    inside = squared.detach() <= 1.0
    length = torch.where(inside, torch.ones_like(squared), squared).sqrt()
    outside = positions / (length * (2.0 - length))
    outside = torch.where(length < 2.0, outside, torch.full_like(outside, torch.nan))
    return torch.where(inside, positions, outside)
