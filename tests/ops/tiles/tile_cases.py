"""Where the tiles of encodings lie: devices, types and strides, for the tests of each of them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

POISON = 7.0


@dataclass(frozen=True)
class Place:
    """Where a tile lies: its device, types and strides."""

    device: str
    scalar: torch.dtype  # of positions, direction, gradient, grad_table
    table: torch.dtype
    features: torch.dtype
    grads: torch.dtype
    strides: str  # rows: sample-major; planes: channel-major, aligned; odd planes: channel-major, not aligned

    def buffer(self, n: int, channels: int, dtype: torch.dtype) -> Tensor:
        if self.strides == "rows":
            return torch.full((n, channels), POISON, dtype=dtype, device=self.device)
        capacity = -(-n // 8) * 8 + (3 if self.strides == "odd planes" else 0)
        return torch.full((channels, capacity), POISON, dtype=dtype, device=self.device)[:, :n].t()

    def tensor(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        buffer = self.buffer(*values.shape, dtype)
        buffer.copy_(values)
        return buffer


def places() -> list[object]:
    f16, b16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
    types = {
        "half": (f32, f16, f16, b16),
        "mixed": (f32, f16, b16, f32),
        "single": (f32, f32, f32, f32),
        "double": (f64, f64, f64, f64),
    }
    found: list[object] = []
    for device, names, layouts in (
        ("cpu", ("single", "double"), ("rows", "planes")),
        ("cuda", tuple(types), ("rows", "planes", "odd planes")),
    ):
        for name in names:
            for strides in layouts:
                marks = [pytest.mark.gpu] if device == "cuda" else []
                place = Place(device, *types[name], strides)
                found.append(pytest.param(place, id=f"{device}-{name}-{strides.replace(' ', '-')}", marks=marks))
    return found


every_place = pytest.mark.parametrize("place", places())
gpu_places = pytest.mark.parametrize("place", [p for p in places() if p.values[0].device == "cuda"])  # type: ignore[attr-defined]


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """As near as arithmetic in the scalar type and one rounding to the result's type come, for the largest value.

    A position rounds to 7 cells, a row sums up to some hundred terms; a 16-bit result rounds by half of its epsilon.
    """
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return
    epsilon = torch.finfo(actual.dtype).eps
    roundings = 128 if epsilon < 1e-5 else 0.51
    scale = max(1.0, expected.abs().max().item())
    assert (actual.double() - expected).abs().max().item() <= roundings * epsilon * scale


def points_along_rays(n: int) -> Tensor:
    """Samples along a few rays, 15 to 60 to the finest cell: cells are shared, and runs end anywhere."""
    origins = torch.rand(-(-n // 300), 1, 3, dtype=torch.float64) * 0.5
    steps = torch.rand(origins.shape[0], 1, 3, dtype=torch.float64) * 0.0017
    return (origins + steps * torch.arange(300).unsqueeze(1)).reshape(-1, 3)[:n]
