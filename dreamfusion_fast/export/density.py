"""A density at the points of a grid, which surfaces are made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from dreamfusion_fast.rendering.occupancy import OccupancyGrid

# Optical depth of a voxel below which nothing is sampled.
EMPTY = 1e-3


@dataclass(frozen=True, eq=False)
class DensityGrid:
    """A density at the points of a cubic grid."""

    values: NDArray[np.float32]
    """[nx, ny, nz], per scene unit."""
    low: NDArray[np.float64]
    """[3], position of the first point, scene units."""
    voxel: float
    """Distance between points, scene units."""
    device: torch.device | str = "cpu"
    """Where it is looked at."""

    @property
    def high(self) -> NDArray[np.float64]:
        """[3], position of the last point, scene units."""
        return self.low + self.voxel * (np.array(self.values.shape) - 1)

    @cached_property
    def occupancy(self) -> OccupancyGrid:
        """Every place where the density, interpolated between the points, absorbs light."""
        occupancy = OccupancyGrid(tuple(float(x) for x in (*self.low, *self.high)), resolution=64).to(self.device)
        cells = F.max_pool3d(torch.from_numpy(self.values)[None, None].to(self.device), 2, 1)  # a cell's eight corners
        coarse = F.adaptive_max_pool3d(cells, (64, 64, 64))[0, 0]
        occupancy.set_occupied(coarse * self.voxel > EMPTY)
        return occupancy


def sample_density(
    density_fn: Callable[[torch.Tensor], torch.Tensor], aabb: torch.Tensor, resolution: int = 128, chunk: int = 1 << 18
) -> DensityGrid:
    """Evaluate a density at the points of a cubic grid that spans a box.

    Args:
        density_fn: positions [m, 3] (scene units, float32, on the device of `aabb`) to densities [m].
        aabb: [6], (xmin, ymin, zmin, xmax, ymax, zmax).
        resolution: cells along the longest side of the box. A shorter side that is no multiple of their size is
            overshot, centred.
        chunk: positions handed to density_fn at a time.
    """
    if aabb.shape != (6,):
        raise ValueError(f"aabb has to have shape [6], not {list(aabb.shape)}")
    if resolution < 2:
        raise ValueError(f"resolution has to be at least 2, not {resolution}")
    box = aabb.detach().cpu().double().numpy()
    extent = box[3:] - box[:3]
    if not (extent > 0).all():
        raise ValueError(f"aabb has to have its lower corner first, not {box.tolist()}")
    voxel = float(extent.max()) / resolution
    cells = np.ceil(extent / voxel - 1e-6).astype(int)
    low = box[:3] + (extent - cells * voxel) / 2
    axes = [torch.as_tensor(low[i] + voxel * np.arange(cells[i] + 1), dtype=torch.float32) for i in range(3)]
    shape = tuple(len(axis) for axis in axes)
    density = np.empty(int(np.prod(shape)), np.float32)
    with torch.no_grad():
        for start in range(0, density.size, chunk):
            index = torch.unravel_index(torch.arange(start, min(start + chunk, density.size)), shape)
            positions = torch.stack([axis[of] for axis, of in zip(axes, index, strict=True)], dim=-1)
            values = density_fn(positions.to(aabb.device))
            density[start : start + len(positions)] = values.reshape(-1).float().cpu().numpy()
    return DensityGrid(density.reshape(shape), low, voxel, aabb.device)
