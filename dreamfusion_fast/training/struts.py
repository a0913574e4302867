"""Straight rods between the pieces of an object that score distillation has torn apart.

An early field holds its parts together by haze. Later steps clear it away, and with it what is as thin as a pixel or
two: the column of a swivel chair, the ankles of a cat. A printed or simulated object has to be in one piece, and most
objects are. So pieces with a small gap between them are joined where they come closest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.ndimage
import torch
from numpy.typing import NDArray
from torch import Tensor

from dreamfusion_fast.export.density import DensityGrid
from dreamfusion_fast.rendering.rays import Rays

# Density times the box's longest side from which on a point of the grid belongs to a piece: between what the last stage
# has made opaque (some 80) and what it has emptied.
_INSIDE = 20.0
# Pieces with a smaller share of the largest one's volume are left alone, as the export drops them.
_SMALLEST = 0.005
# A rod begins in the middle of all points that are farther from the other piece than the closest by so many voxels.
_ABOUT_AS_CLOSE = 1.5
# Radius of a rod: this share of the radius of the thinner end, within bounds in voxels of 1/128 of the box.
_AS_THICK, _THINNEST, _THICKEST = 0.8, 1.25, 3.0


@dataclass(frozen=True, eq=False)
class Struts:
    """Rods with round ends."""

    start: Tensor
    """[k, 3] float32, middle of one end, scene units."""
    end: Tensor
    """[k, 3] float32, middle of the other end, scene units."""
    radius: Tensor
    """[k] float32, scene units."""

    def __len__(self) -> int:
        return len(self.radius)

    def to(self, device: torch.device | str) -> Struts:
        """The same on another device."""
        return Struts(self.start.to(device), self.end.to(device), self.radius.to(device))

    def hit(self, rays: Rays) -> tuple[Tensor, Tensor]:
        """The rod that each ray passes within its radius: `[n]` int64, -1 for none, and how far along it, `[n]`."""
        direction = rays.directions[:, None]
        along, offset = self.end - self.start, rays.origins[:, None] - self.start
        # Seen along the ray, the axis is a line in a plane, and the ray a point of it.
        along = along - (along * direction).sum(-1, keepdim=True) * direction
        offset = offset - (offset * direction).sum(-1, keepdim=True) * direction
        share = ((offset * along).sum(-1) / along.square().sum(-1).clamp(min=1e-12)).clamp(0.0, 1.0)
        inside, rod = ((offset - share[..., None] * along).norm(dim=-1) - self.radius).min(dim=1)
        return torch.where(inside < 0.0, rod, -1), share.gather(1, rod[:, None])[:, 0]

    def points(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random points inside, `[count, 3]`, and the radius of the rod that each is in, `[count]`; CPU only."""
        rod = torch.randint(len(self), (count,), generator=generator)
        share = torch.rand(count, 1, generator=generator)
        offset = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1)
        offset = offset * torch.rand(count, 1, generator=generator) ** (1 / 3)
        radius = self.radius[rod]
        return torch.lerp(self.start[rod], self.end[rod], share) + offset * radius[:, None], radius


def find_struts(grid: DensityGrid, longest: float) -> Struts | None:
    """The rods that make one piece of all pieces of a density, as far as they reach.

    The largest piece is the first; the closest of the others is joined to it, then the closest to both, and so on
    (Prim's minimum spanning tree).

    Args:
        grid: the density.
        longest: gap that a rod bridges at most, share of the grid's longest side.

    Returns:
        The rods, on the CPU; None where all is in one piece or too far away.
    """
    cells, voxel = max(grid.values.shape) - 1, grid.voxel
    piece, count = scipy.ndimage.label(grid.values * (voxel * cells) > _INSIDE)
    volume = np.bincount(piece.ravel(), minlength=count + 1)
    volume[0] = 0
    others = {int(k) for k in np.flatnonzero(volume >= max(_SMALLEST * volume.max(initial=0), 1))}
    if len(others) < 2:
        return None
    first = int(volume.argmax())
    others.remove(first)
    used = scipy.ndimage.find_objects((piece > 0).astype(np.int8))[0]
    piece, corner = piece[used], np.array([side.start for side in used])
    joined = piece == first
    thickness = scipy.ndimage.distance_transform_edt(piece > 0)
    start, end, radius = [], [], []
    while others:
        gap, nearest = scipy.ndimage.distance_transform_edt(~joined, return_indices=True)
        gaps = scipy.ndimage.minimum(gap, piece, sorted(others))
        closest = sorted(others)[int(np.argmin(gaps))]
        shortest = float(np.min(gaps))
        if shortest - 1 > longest * cells:  # the surfaces lie half a voxel from the outermost points
            break
        there = np.argwhere((piece == closest) & (gap <= shortest + _ABOUT_AS_CLOSE))
        # A point of the piece, should the middle of all be none.
        one = there[np.linalg.norm(there - there.mean(axis=0), axis=1).argmin()]
        other = nearest[:, one[0], one[1], one[2]]
        thin = min(_inner(thickness, one), _inner(thickness, other))
        radius.append(np.clip(_AS_THICK * thin, _THINNEST * cells / 128, _THICKEST * cells / 128))
        start.append(one + corner)
        end.append(other + corner)
        joined |= piece == closest
        others.remove(closest)
    if not radius:
        return None
    first_end, last_end = (
        torch.from_numpy((grid.low + voxel * np.stack(ends)).astype(np.float32)) for ends in (start, end)
    )
    return Struts(first_end, last_end, torch.tensor(np.stack(radius), dtype=torch.float32) * voxel)


def _inner(thickness: NDArray[np.float64], at: NDArray[np.int64]) -> float:
    """How thick the piece is close to a point of its surface, voxels."""
    around = tuple(slice(max(int(k) - 3, 0), int(k) + 4) for k in at)
    return float(thickness[around].max())
