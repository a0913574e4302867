"""Rays and grids for the tests of the march, and what it means that two marches agree."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamfusion_fast.ops import occupancy_pack

BOX = (-1.0, -1.0, -1.0, 1.0, 1.0, 1.0)
OTHER_BOX = (-0.7, -1.1, -0.3, 0.9, 1.3, 2.2)


def make_rays(n: int, dtype: torch.dtype, device: torch.device, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    """Rays from inside and outside the boxes, some along the axes, some along the walls of cells, some nowhere."""
    origins = spread * torch.randn(n, 3, dtype=dtype)
    directions = torch.nn.functional.normalize(torch.randn(n, 3, dtype=dtype), dim=-1)
    directions[torch.rand(n, 3) < 0.15] = 0.0
    on_walls = torch.rand(n) < 0.2
    origins[on_walls] = (origins[on_walls] * 4).round() / 4
    return origins.to(device), directions.to(device)


def make_bits(resolution: int, share: float, device: torch.device, cascades: int = 1) -> Tensor:
    """Random grids of which about that share is occupied."""
    return occupancy_pack(torch.rand(cascades, resolution, resolution, resolution, device=device), 1.0 - share)


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=0)
