"""Real spherical harmonics: smooth functions of a direction, from coarse to fine."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST_BANDS = 4


def spherical_harmonics(directions: Tensor, degree: int) -> Tensor:
    """The real spherical harmonics Y_lm of the first `degree` bands, l below `degree`.

    They are orthonormal over the sphere, with the Condon-Shortley phase (-1)^m, as in "Efficient Spherical Harmonic
    Evaluation" (Sloan 2013) and in what instant-ngp and PlenOctrees call degree: Y_1 is (-y, z, -x) sqrt(3 / (4 pi)).

    Args:
        directions: `[..., 3]`, unit length, any floating-point dtype.
        degree: bands, 1 to 4.

    Returns:
        `[..., degree^2]`, Y_lm at l (l + 1) + m: band after band, m from -l to l. Polynomials, differentiable any
        number of times.

    Raises:
        TypeError, ValueError: directions of another type or shape, another degree.
    """
    if not isinstance(directions, Tensor) or not directions.is_floating_point():
        given = directions.dtype if isinstance(directions, Tensor) else type(directions).__name__
        raise TypeError(f"directions: got {given}, want a floating-point tensor [..., 3]")
    if directions.dim() < 1 or directions.shape[-1] != 3:
        raise ValueError(f"directions: got shape {list(directions.shape)}, want [..., 3]")
    if degree not in range(1, MOST_BANDS + 1):
        raise ValueError(f"degree: got {degree}, want 1 to {MOST_BANDS}")
    x, y, z = directions.unbind(dim=-1)
    xx, yy, zz = x * x, y * y, z * z

    def root(times: float) -> float:
        return math.sqrt(times / math.pi)

    bands = [torch.full_like(x, root(1 / 4))]
    if degree > 1:
        one = root(3 / 4)
        bands += [-one * y, one * z, -one * x]
    if degree > 2:
        two = root(15 / 4)
        bands += [two * x * y, -two * y * z, root(5 / 16) * (3.0 * zz - 1.0), -two * x * z, 0.5 * two * (xx - yy)]
    if degree > 3:
        outer, middle, inner = root(35 / 32), root(105 / 4), root(21 / 32)
        bands += [
            -outer * y * (3.0 * xx - yy),
            middle * x * y * z,
            -inner * y * (5.0 * zz - 1.0),
            root(7 / 16) * z * (5.0 * zz - 3.0),
            -inner * x * (5.0 * zz - 1.0),
            0.5 * middle * z * (xx - yy),
            -outer * x * (xx - 3.0 * yy),
        ]
    return torch.stack(bands, dim=-1)
