"""Where rays are sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dreamfusion_fast.ops.ray_box import native_ray_box, ray_box_reference
from dreamfusion_fast.ops.tiles.march import MAX_STEPS, MarchedRays, occupied_blocks
from dreamfusion_fast.rendering.config import RendererConfig
from dreamfusion_fast.rendering.occupancy import OccupancyGrid
from dreamfusion_fast.rendering.rays import Rays


def cone_distances(
    near: float,
    far: float,
    min_step: float,
    max_step: float,
    cone_angle: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Distances for `march_lattice` whose steps grow with the distance, as a pixel's cone does.

    ``d_0 = near``, ``d_{k+1} = d_k + clamp(d_k * cone_angle, min_step, max_step)``, in float64, until `far` is reached
    (Mueller et al. 2022, appendix E.1; nerfacc's ``cone_angle``, raymarching's ``dt_gamma``). A table with another
    `far` begins with the same numbers.

    Args:
        near: where the first sample begins.
        far: the last sample ends there or behind it.
        min_step: least length of a sample, > 0.
        max_step: largest length, may be infinite.
        cone_angle: growth of the length per distance, >= 0; 0.004 is 1/256.
        dtype: of the result, float32 or float64.
        device: of the result.

    Returns:
        ``[n + 1]``, rising.

    Raises:
        ValueError: an argument out of range, more than 2^24 samples, or steps too short for the dtype.
    """
    if not (-math.inf < near < far < math.inf):
        raise ValueError(f"cone_distances: near and far must be numbers, near < far, got {near} and {far}")
    if not (0.0 < min_step <= max_step and min_step < math.inf):
        raise ValueError(f"cone_distances: want 0 < min_step <= max_step, got {min_step} and {max_step}")
    if not 0.0 <= cone_angle < math.inf:
        raise ValueError(f"cone_distances: cone_angle must be at least 0, got {cone_angle}")
    edges = [near]
    while edges[-1] < far:
        if len(edges) > MAX_STEPS:
            raise ValueError(f"cone_distances: more than 2^24 samples between {near} and {far}, min_step is {min_step}")
        edges.append(edges[-1] + min(max(edges[-1] * cone_angle, min_step), max_step))
    distances = torch.tensor(edges, dtype=torch.float64).to(dtype)
    if not bool((distances.diff() > 0).all()):
        raise ValueError(f"cone_distances: min_step {min_step} is below what {dtype} can tell apart at {far}")
    return distances.to(device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def cached_cone_distances(
    near: float,
    far: float,
    min_step: float,
    max_step: float,
    cone_angle: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """`cone_distances`, kept: it takes milliseconds, and a copy to the GPU. Not to be changed in place."""
    return cone_distances(near, far, min_step, max_step, cone_angle, dtype, device)


def covering_distance(t_far: Tensor, unit: float) -> float:
    """A distance that no finite t_far `[n_rays]` exceeds: one of `unit` * 2, 4, 8, ..., so that tables made for it are
    few. Waits for the GPU. `unit` > 0."""
    reach = float(torch.where(t_far.isfinite(), t_far, unit).amax()) if t_far.shape[0] > 0 else unit
    return unit * 2.0 ** max(math.ceil(math.log2(max(reach / unit, 1.0))), 1)


@dataclass(frozen=True, eq=False)
class SampledSpace:
    """Where rays are sampled: the grid, and each ray's part in its box.

    Attributes:
        t_near, t_far: `[n_rays]`.
        aabb: `[6]`, the scene box.
        bitfield: occupied cells, or None: all are.
        resolution, cascades: of the grid.
        diagonal: of the box in which anything is sampled, scene units.
        step: length of a sample; the least with distances.
        distances: edges of samples that grow, or None.
    """

    t_near: Tensor
    t_far: Tensor
    aabb: Tensor
    bitfield: Tensor | None
    resolution: int
    cascades: int
    diagonal: float
    step: float
    distances: Tensor | None

    @classmethod
    def of(
        cls,
        rays: Rays,
        aabb: Tensor,
        occupancy: OccupancyGrid | None,
        config: RendererConfig,
        diagonal: float,
        step: float,
    ) -> SampledSpace:
        """The space in which `rays` are sampled; nothing waits for a GPU unless samples grow without an end.

        Args:
            rays: `n_rays` rays.
            aabb: `[6]`, the scene box.
            occupancy: where there is anything, or None.
            config: near, far and the growth of the steps.
            diagonal: of the scene box, scene units.
            step: length of a sample, scene units.
        """
        dtype = rays.origins.dtype
        aabb = aabb.to(dtype)
        outer = aabb if occupancy is None or occupancy.cascades == 1 else occupancy.outer_aabb.to(dtype)
        box = native_ray_box if config.backend == "native" else ray_box_reference
        t_near, t_far = box(rays.origins.detach(), rays.directions.detach(), outer, config.near, config.far)
        if rays.near is not None:  # a ray that misses the box stays at infinity
            t_near = torch.maximum(t_near, rays.near.detach())
        if rays.far is not None:
            t_far = torch.minimum(t_far, rays.far.detach())
        bitfield, resolution, cascades = None, 1, 1
        if occupancy is not None:
            bitfield, resolution, cascades = occupancy.bitfield, occupancy.resolution, occupancy.cascades
        distances = None
        if config.cone_angle > 0.0:
            far = config.far if math.isfinite(config.far) else covering_distance(t_far, max(config.near, step))
            steps = (step, math.inf if config.max_step is None else config.max_step)
            distances = cached_cone_distances(config.near, far, *steps, config.cone_angle, dtype, t_far.device)
        outer_diagonal = diagonal * 2 ** (cascades - 1)
        return cls(t_near, t_far, aabb, bitfield, resolution, cascades, outer_diagonal, step, distances)

    def marched(self, rays: Rays, jitter: bool, seed: int | Tensor) -> MarchedRays:
        """The same rays as the native core marches them; those with a limit that is none with an origin of NaN, which
        whoever counts the samples finds."""
        blocks = None if self.bitfield is None else occupied_blocks(self.bitfield, self.resolution, self.cascades)
        origins = rays.origins
        for limit in (rays.near, rays.far):
            if limit is not None:
                good = limit >= 0.0 if limit is rays.near else ~limit.isnan()
                origins = torch.where(good[:, None], origins, math.nan)
        return MarchedRays(
            origins.contiguous(),
            rays.directions.contiguous(),
            self.t_near,
            self.t_far,
            self.aabb,
            self.bitfield,
            blocks,
            self.resolution,
            self.step,
            jitter,
            seed,
            self.cascades,
            self.distances,
        )
