"""Surfaces given by a signed distance: what makes the opacity or the density of a sample of it.

A field that learns a signed distance returns one of these in its :class:`FieldOutput`. Both have a learned sharpness.
"""

from __future__ import annotations

import torch
from torch import Tensor


def neus_alpha(distance: Tensor, cosine: Tensor, length: Tensor, sharpness: Tensor) -> Tensor:
    """Opacity of samples by the distances at both of their ends (NeuS, Wang et al. 2021, equation 13).

    ``alpha = max(0, (Phi(f_start) - Phi(f_end)) / Phi(f_start))`` with Phi the logistic function of ``sharpness * f``.
    The distances at the ends are those of a plane: ``f -+ cosine * length / 2``.

    Args:
        distance: ``[m]``, signed distance in the middle of each sample, scene units, positive outside.
        cosine: ``[m]``, of the angle between the ray's direction and the gradient of the distance, below 0 where the
            ray enters. NeuS ramps it up from -1 / 2 early in training; one above 0 gives an opacity of 0.
        length: ``[m]``, of each sample, scene units: ``samples.t_ends - samples.t_starts``.
        sharpness: ``[]`` or ``[m]``, 1 / s of the paper, > 0; grows while a surface becomes one.

    Returns:
        ``[m]`` in [0, 1], differentiable to all but the length.
    """
    half = 0.5 * cosine * length
    start, end = sharpness * (distance - half), sharpness * (distance + half)
    # Phi(end) / Phi(start) by logarithms: far inside both underflow, and the quotient does not.
    passed = torch.nn.functional.logsigmoid(end) - torch.nn.functional.logsigmoid(start)
    return -torch.expm1(passed.clamp(max=0.0))


def volsdf_density(distance: Tensor, beta: Tensor) -> Tensor:
    """Density by the distribution function of a Laplace distribution (VolSDF, Yariv et al. 2021, equations 2 and 3).

    ``density = Psi(-f) / beta`` with Psi(s) = exp(s / beta) / 2 for s <= 0 and 1 - exp(-s / beta) / 2 above.

    Args:
        distance: ``[m]``, signed distance, scene units, positive outside.
        beta: ``[]`` or ``[m]``, width of the surface, scene units, > 0.

    Returns:
        ``[m]``, per scene unit, differentiable to both.
    """
    # By sides, as abs() has no gradient at 0, where the density has one. What a side does not use stays finite.
    outside = 0.5 * torch.exp(-distance.clamp(min=0.0) / beta)
    inside = 1.0 - 0.5 * torch.exp(distance.clamp(max=0.0) / beta)
    return torch.where(distance >= 0.0, outside, inside) / beta
