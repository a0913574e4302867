"""The surface that agrees with what a renderer shows, from a density alone.

A level set of the density is not what is seen: a thin rod of middling density can be opaque, and a wide haze of low
density, too. So the density is looked at from many sides. Of each pixel two things are kept: whether the ray through it
is opaque, and how far along the ray matter begins. A point is outside where a view sees past it (the ray through it is
not opaque: shape from silhouettes, Laurentini 1994), or where matter begins behind it (space carving, Kutulakos and
Seitz 2000). The signed distances that the views give are joined by their second smallest, and its zero is the surface.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.ndimage
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.export.density import EMPTY, DensityGrid
from dreamfusion_fast.export.views import one, rings
from dreamfusion_fast.ops import march
from dreamfusion_fast.ops.ray_box import ray_box
from dreamfusion_fast.rendering.cameras import Cameras
from dreamfusion_fast.rendering.occupancy import OccupancyGrid

OPAQUE = 0.5
"""A pixel shows the object where at least this share of the light behind it is absorbed."""

# Elevation in degrees and number of the views. From far below no object is looked at while it is optimised.
_VIEWS = ((-15.0, 12), (10.0, 12), (35.0, 10), (60.0, 8), (85.0, 4))
_SIZE = 256
# Matter begins where this share of the light is absorbed that the whole ray absorbs, or of all light, whichever comes
# first. Of thin soft rods, which are looked at from all sides, the middle alone would be left with larger ones (0.15:
# a rod of a Gaussian's profile keeps 80 % of its width).
_BEGINS = 0.06
# Points of which more than one view says that they lie so many voxels outside are not looked at again.
_FAR_OUTSIDE = 2.0


def threshold_advice(largest: float) -> str:
    """Advice for a density that has no surface, `largest` at most: half of nothing would be no threshold."""
    return f"export with a --threshold, such as {largest / 2:.2g}, or train longer" if largest > 0 else "train longer"


def seen_distance(grid: DensityGrid) -> NDArray[np.float32]:
    """Signed distance to the surface that is seen, positive inside, exact near the surface only.

    One view alone may be wrong about a point, such as one that looks through a soft edge, so two have to agree that it
    is outside.

    Args:
        grid: the density, finite.

    Returns:
        [nx, ny, nz], scene units, at most 2 voxels below zero.

    Raises:
        UserError: no ray of any view is opaque.
    """
    voxel, device = grid.voxel, grid.device
    density = torch.from_numpy(grid.values).to(device).clamp(min=0.0)
    center, radius = _ball_around(density * voxel > EMPTY, grid.low, voxel)
    cameras = rings(_VIEWS, center, radius, device)
    first = torch.tensor(grid.low, dtype=torch.float32, device=device)
    # Only where the light could be absorbed, and around it, there is anything to find.
    around = F.max_pool3d(density[None, None], 5, 1, 2)[0, 0] * voxel > EMPTY
    positions = first + voxel * around.nonzero()
    least = torch.full((len(positions),), torch.inf, device=device)
    second = least.clone()
    alive = torch.arange(len(positions), device=device)
    opaque = False
    for view in range(len(cameras)):
        camera = one(cameras, view)
        opacity, depth = _look(density, first, voxel, grid.occupancy, camera)
        images = _distance_images(opacity, depth)
        opaque |= images is not None
        here = positions[alive]
        if images is None:  # this view sees past everything
            distance = torch.full((len(alive),), -torch.inf, device=device)
        else:
            distance = _distance(here, camera, images.to(device), voxel)
        smaller = torch.minimum(least[alive], distance)
        second[alive] = torch.minimum(second[alive], torch.maximum(least[alive], distance))
        least[alive] = smaller
        alive = alive[second[alive] > -_FAR_OUTSIDE * voxel]
    if not opaque:
        largest = float(grid.values.max())
        raise UserError(
            f"there is no surface: the field is nowhere opaque (its largest density is {largest:.4g}); "
            f"{threshold_advice(largest)}"
        )
    result = torch.full_like(density, -_FAR_OUTSIDE * voxel)
    result[around] = second.clamp(-_FAR_OUTSIDE * voxel, 1.0)
    return result.cpu().numpy()


def _ball_around(occupied: Tensor, low: NDArray[np.float64], voxel: float) -> tuple[Tensor, float]:
    """Centre [3] and radius of a ball around all occupied points, or around all points where none is."""
    center, half = [], []
    for axis in range(3):
        other = tuple(a for a in range(3) if a != axis)
        hits = occupied.any(dim=other[1]).any(dim=other[0]).nonzero()[:, 0].tolist()
        ends = (hits[0], hits[-1]) if hits else (0, occupied.shape[axis] - 1)
        center.append(low[axis] + voxel * 0.5 * (ends[0] + ends[1]))
        half.append(voxel * 0.5 * (ends[1] - ends[0]))
    return torch.tensor(center, dtype=torch.float32), math.hypot(*half) + voxel


def _look(
    grid: Tensor, first: Tensor, voxel: float, occupancy: OccupancyGrid, camera: Cameras
) -> tuple[Tensor, Tensor]:
    """Opacity and distance at which matter begins, `[_SIZE, _SIZE]` each, the latter where there is any matter."""
    rays = camera.rays(_SIZE, _SIZE)
    t_near, t_far = ray_box(rays.origins, rays.directions, occupancy.aabb)
    offsets, t, ray = march(
        rays.origins, rays.directions, t_near, t_far, occupancy.aabb, occupancy.bitfield, occupancy.resolution, voxel
    )
    ray, offsets = ray.long(), offsets.long()
    if len(t) == 0:
        nothing = torch.zeros(_SIZE, _SIZE, device=grid.device)
        return nothing, nothing
    positions = rays.origins[ray] + rays.directions[ray] * t[:, None]
    size = torch.tensor(grid.shape, device=grid.device) - 1
    inside = (positions - first) / (voxel * size) * 2.0 - 1.0
    # grid_sample wants the last axis first.
    sampled = F.grid_sample(grid.permute(2, 1, 0)[None, None], inside[None, None, None], align_corners=True)
    optical = sampled.view(-1) * voxel
    ends = F.pad(optical.double().cumsum(0), (1, 0))
    before = ends[offsets[:-1]]
    total = (ends[offsets[1:]] - before).float()
    reached = (ends[1:] - before[ray]).float()
    begins = torch.minimum(total * _BEGINS, torch.full_like(total, -math.log1p(-_BEGINS)))
    # What is absorbed only grows along a ray, so those samples come first at which too little is.
    short = torch.zeros(len(total), dtype=torch.int64, device=grid.device)
    short.index_add_(0, ray, (reached < begins[ray]).long())
    at = (offsets[:-1] + short).clamp(max=len(t) - 1)
    behind = ((reached[at] - begins) / optical[at].clamp(min=1e-12)).clamp(0.0, 1.0)
    return -torch.expm1(-total).view(_SIZE, _SIZE), (t[at] + (0.5 - behind) * voxel).view(_SIZE, _SIZE)


def _distance_images(opacity: Tensor, depth: Tensor) -> Tensor | None:
    """Two images on the CPU, `[2, _SIZE, _SIZE]`, or None where no pixel is opaque.

    The first is the signed distance to the silhouette in pixels, positive inside; the second is the depth, continued
    beyond the silhouette by that of the nearest opaque pixel.
    """
    mask = (opacity >= OPAQUE).cpu().numpy()
    if not mask.any():
        return None
    outside, nearest = scipy.ndimage.distance_transform_edt(~mask, return_indices=True)
    signed = np.where(mask, scipy.ndimage.distance_transform_edt(mask) - 0.5, 0.5 - outside)
    continued = depth.cpu().numpy()[nearest[0], nearest[1]]
    return torch.from_numpy(np.stack([signed, continued]).astype(np.float32))


def _distance(positions: Tensor, camera: Cameras, images: Tensor, voxel: float) -> Tensor:
    """Signed distance `[n]` of points `[n, 3]` to what one view shows, positive inside, scene units."""
    pose = camera.camera_to_world[0]
    offset = positions - pose[:, 3]
    right, up, back = (offset @ pose[:, :3]).unbind(dim=1)
    focal = 0.5 * _SIZE / torch.tan(0.5 * camera.fov_y[0])
    last = _SIZE - 1
    column = (0.5 * last - focal * right / back).clamp(0.0, last)
    row = (0.5 * last + focal * up / back).clamp(0.0, last)
    left, top = column.long().clamp(max=last - 1), row.long().clamp(max=last - 1)
    x, y = column - left, row - top
    corner = top * _SIZE + left
    flat = images.view(2, -1)
    corners = torch.stack([flat[:, corner + k] for k in (0, 1, _SIZE, _SIZE + 1)])  # [4, 2, n]
    weights = torch.stack([(1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y])
    silhouette, depth = (corners * weights[:, None]).sum(dim=0)
    # Between what is near and what is far lies nothing: there, only what is before both is seen past.
    nearest, farthest = corners[:, 1].amin(dim=0), corners[:, 1].amax(dim=0)
    depth = torch.where(farthest - nearest < 3.0 * voxel, depth, nearest)
    return torch.minimum(silhouette * (-back / focal), offset.norm(dim=1) - depth)
