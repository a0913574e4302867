"""Where gridencoder's vertices lie, how many rows its levels have, and the encoding by it.

With S = log2(per_level_scale) and H = base_resolution, both flavours have the size s_l = 2^(l S) H of a level in
float32, and:

    stable-dreamfusion   N = ceil(s)           N vertices an axis; cells u = clamp(N x - 1/2, 0, N - 1),
                                               with aligned corners u = (N - 1) x
    torch-ngp            N = ceil(s - 1) + 1   N + 1 vertices an axis; cells u = (s - 1) x + 1/2,
                                               with aligned corners N vertices and u = (s - 1) x

Positions outside [0, 1] give zeros in both, and so they have no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dreamfusion_fast.ops import hash_grid, hash_grid_reference
from dreamfusion_fast.ops._checks import shown
from dreamfusion_fast.ops.hash_grid_placement import hash_grid_placements

FLAVOURS = ("stable-dreamfusion", "torch-ngp")
LEVEL_DIMS = (1, 2, 4, 8, 16, 32)
_WIDEST = 8  # features that the ops take at once


def check_flavour(op: str, flavour: str) -> None:
    """Raises ValueError for a name that is not one of `FLAVOURS`."""
    if flavour not in FLAVOURS:
        raise ValueError(f"{op}: flavour must be {' or '.join(FLAVOURS)}, got {shown(flavour)}")


@dataclass(frozen=True)
class Geometry:
    """The options that a grid's vertices depend on.

    Attributes:
        log2_scale: S, the growth of resolution per level.
        base_resolution: H.
        num_levels, input_dim: counts.
        hashed: gridtype "hash", or else "tiled".
        align_corners: whether the first and the last vertex lie on the faces of the box.
        flavour: one of `FLAVOURS`.
    """

    log2_scale: float
    base_resolution: int
    num_levels: int
    input_dim: int
    hashed: bool = True
    align_corners: bool = False
    flavour: str = "stable-dreamfusion"

    @property
    def is_ours(self) -> bool:
        """Whether `hash_grid` has it without placements, which is quicker."""
        aligned = self.flavour == "stable-dreamfusion" and self.align_corners and self.base_resolution > 1
        return aligned and self.hashed and self.input_dim == 3 and self.log2_scale >= 0


@lru_cache(maxsize=256)
def placements_of(geometry: Geometry, device: torch.device) -> tuple[Tensor, Tensor]:
    """Resolutions and placements of the levels, as `hash_grid` takes them, on a device."""
    growth = np.float32(geometry.log2_scale)
    sizes = [np.exp2(np.float32(i) * growth) * np.float32(geometry.base_resolution) for i in range(geometry.num_levels)]
    highest: list[int] | None = None
    if geometry.flavour == "torch-ngp":
        scales = [float(size - np.float32(1)) for size in sizes]
        sides = [math.ceil(scale) + (1 if geometry.align_corners else 2) for scale in scales]
        shift = 0.0 if geometry.align_corners else 0.5
    else:
        sides = [math.ceil(size) for size in sizes]
        highest = [side - 1 for side in sides]
        scales = [float(end) for end in (highest if geometry.align_corners else sides)]
        shift = 0.0 if geometry.align_corners else -0.5
    with torch.inference_mode(False):  # they are kept, and may be needed for a gradient later
        placements = hash_grid_placements(scales, sides, shift, highest, geometry.hashed, geometry.input_dim)
        resolutions = torch.tensor([max(side - 1, 1) for side in sides], dtype=torch.int32)
        return resolutions.to(device), placements.to(device)


def encode(
    positions: Tensor, table: Tensor, offsets: Tensor, geometry: Geometry, smoothstep: bool, levels: int
) -> Tensor:
    """The features of the first levels at positions.

    Args:
        positions: ``[n, input_dim]``, float32 or float64.
        table: ``[rows of those levels, level_dim]``, of the same type, level_dim one of `LEVEL_DIMS`.
        offsets: ``[at least levels + 1]``, any integers, the first row of each level.
        geometry: of all levels.
        smoothstep: as in `hash_grid`.
        levels: how many of them.

    Returns:
        ``[n, levels, level_dim]``, zeros where a position is outside [0, 1]; twice differentiable.
    """
    resolutions, placements = placements_of(geometry, positions.device)
    placed = None if geometry.is_ours else placements[:levels]
    run = hash_grid if positions.shape[1] in (2, 3) else hash_grid_reference
    level_offsets = offsets[: levels + 1].long()
    features = []
    for part in table.split(_WIDEST, 1):
        found = run(positions, part, level_offsets, resolutions[:levels], smoothstep, placed)
        features.append(found.unflatten(1, (levels, part.shape[1])))
    joined = features[0] if len(features) == 1 else torch.cat(features, 2)
    return torch.where(inside(positions)[:, None, None], joined, 0)


def inside(positions: Tensor) -> Tensor:
    """``[n]``: whether a position is one that is encoded. NaN is, to NaN."""
    return ~((positions < 0) | (positions > 1)).any(1)
