"""Rays and a grid for the tests of raymarching."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamfusion_fast.integrations import raymarching


def scene(
    n: int, bound: float, size: int, cascades: int, device: torch.device, share: float = 0.3
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    origins = torch.randn(n, 3, generator=generator) * 1.5 * bound
    directions = torch.nn.functional.normalize(
        0.8 * bound * torch.rand(n, 3, generator=generator) - 0.4 * bound - origins, dim=1
    )
    grid = torch.rand(cascades, size**3, generator=generator)
    return origins.to(device), directions.to(device), grid.to(device), raymarching.packbits(grid.to(device), 1 - share)
