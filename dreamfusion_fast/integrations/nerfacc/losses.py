"""Losses on the samples of rays."""

from __future__ import annotations

from torch import Tensor

from dreamfusion_fast.integrations.nerfacc.scan import exclusive_sum
from dreamfusion_fast.integrations.nerfacc.volrend import accumulate_along_rays


def distortion(weights: Tensor, t_starts: Tensor, t_ends: Tensor, ray_indices: Tensor, n_rays: int) -> Tensor:
    """How far a ray's weights are spread out (mip-NeRF 360, Barron et al. 2022, eq. 15).

    ``sum_ij w_i w_j |m_i - m_j| + sum_i w_i^2 d_i / 3`` with the middles m and lengths d of the intervals.

    Args:
        weights, t_starts, t_ends: `[n_samples]`; the intervals of a ray follow each other.
        ray_indices: int64 `[n_samples]`, ray of each sample, never falling.
        n_rays: number of rays.

    Returns:
        `[n_rays, 1]`. Differentiable. Waits for a GPU.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape.
    """
    for name, tensor in (("t_starts", t_starts), ("t_ends", t_ends), ("ray_indices", ray_indices)):
        if tensor.shape != weights.shape:
            raise ValueError(f"distortion: {name} has shape {list(tensor.shape)}, weights {list(weights.shape)}")
    middles = 0.5 * (t_starts + t_ends)
    before = exclusive_sum(weights, indices=ray_indices)
    moment_before = exclusive_sum(weights * middles, indices=ray_indices)
    between = 2.0 * weights * (middles * before - moment_before)
    within = weights.square() * (t_ends - t_starts) / 3.0
    return accumulate_along_rays(between + within, None, ray_indices, n_rays)
