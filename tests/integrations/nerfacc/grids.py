"""Occupied cells by the words of nerfacc's interface, in float64 loops; shared by the tests of grid and estimator."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

Interval = tuple[int, float, float]


def first_occupied(position: list[float], boxes: list[list[float]], occupied: Tensor) -> bool:
    """Whether the cell of the first box that holds a place is occupied; outside of all nothing is."""
    for level, box in enumerate(boxes):
        sizes = occupied.shape[1:]
        cell = [(position[a] - box[a]) / (box[a + 3] - box[a]) * sizes[a] for a in range(3)]
        if all(0 <= cell[a] < sizes[a] for a in range(3)):
            return bool(occupied[level, int(cell[0]), int(cell[1]), int(cell[2])])
    return False


def expected_intervals(
    rays_o: Tensor,
    rays_d: Tensor,
    boxes: Tensor,
    occupied: Tensor,
    near: list[float],
    far: list[float],
    step: float,
    cone_angle: float = 0.0,
    longest: float = 20.0,
) -> list[Interval]:
    """Each step of each ray, up to a distance, whose middle is in an occupied cell: ray, start, end."""
    found = []
    for ray, (origin, direction) in enumerate(zip(rays_o.tolist(), rays_d.tolist(), strict=True)):
        start, k = near[ray], 0
        while True:
            length = max(start * cone_angle, step)
            middle = start + 0.5 * length
            if middle >= min(far[ray], longest):
                break
            position = [origin[a] + middle * direction[a] for a in range(3)]
            if first_occupied(position, boxes.tolist(), occupied):
                found.append((ray, start, start + length))
            k += 1
            start = near[ray] + k * step if cone_angle == 0 else start + length
    return found


def crossed_cells(rays_o: Tensor, rays_d: Tensor, boxes: Tensor, occupied: Tensor) -> list[Interval]:
    """Of each ray, from distance 0 on, the parts between planes of cells, those in occupied cells."""
    found = []
    sizes = occupied.shape[1:]
    for ray, (origin, direction) in enumerate(zip(rays_o.tolist(), rays_d.tolist(), strict=True)):
        planes = {0.0}
        for box in boxes.tolist():
            for a in range(3):
                for i in range(sizes[a] + 1):
                    plane = box[a] + (box[a + 3] - box[a]) * i / sizes[a]
                    planes.add((plane - origin[a]) / direction[a])
        edges = sorted(t for t in planes if t >= 0 and math.isfinite(t))
        for start, end in itertools.pairwise(edges):
            middle = [origin[a] + 0.5 * (start + end) * direction[a] for a in range(3)]
            if first_occupied(middle, boxes.tolist(), occupied):
                found.append((ray, start, end))
    return found


def random_rays(n: int, device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """From outside, most towards the middle, not of unit length."""
    origins = torch.nn.functional.normalize(torch.randn(n, 3, dtype=torch.float64), dim=-1) * 3
    directions = (torch.randn(n, 3, dtype=torch.float64) * 0.5 - origins) / 2.5
    return origins.to(device, dtype), directions.to(device, dtype)
