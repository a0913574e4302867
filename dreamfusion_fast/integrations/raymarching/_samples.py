"""Marching and compositing, which both flavours of raymarching give other shapes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dreamfusion_fast.integrations.raymarching._grid import as_rays, samples_of
from dreamfusion_fast.ops.composite import composite
from dreamfusion_fast.ops.march_morton import march_morton, march_morton_rows
from dreamfusion_fast.ops.weights import weights_from_density

_DIAGONAL = 2.0 * math.sqrt(3.0)  # of a cube of half size 1


class Grid:
    """Where rays are marched, as the arguments of the functions give it."""

    def __init__(
        self,
        bitfield: Tensor,
        bound: float,
        cascades: int,
        resolution: int,
        cone_angle: float,
        max_steps: int,
        longest: float,
        contract: bool = False,
    ) -> None:
        """`longest` is the half size of the cube whose diagonal has `resolution` of the longest steps."""
        self.bitfield, self.bound, self.cascades, self.resolution = bitfield, bound, cascades, resolution
        self.min_step, self.max_step = _DIAGONAL / max_steps, _DIAGONAL * longest / resolution
        self.cone_angle, self.max_steps, self.contract = cone_angle, max_steps, contract

    def start_of(self, t_near: Tensor, noise: Tensor) -> Tensor:
        """Where the first step begins, as the march has it."""
        step = (t_near * self.cone_angle).clamp(min=self.min_step).clamp(max=self.max_step)
        return t_near + step * noise

    def march(
        self, rays_o: Tensor, rays_d: Tensor, t_near: Tensor, t_far: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Offsets, positions, spans and rays of all samples, see `march_morton`."""
        rays = (rays_o, rays_d, t_near, t_far, noise, self.bitfield)
        steps = (self.min_step, self.max_step, self.cone_angle)
        return march_morton(
            *rays, self.resolution, self.cascades, self.bound, *steps, self.max_steps, bool(self.contract)
        )

    def march_rows(
        self, rays_o: Tensor, rays_d: Tensor, t_near: Tensor, t_far: Tensor, noise: Tensor, limit: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Positions, directions and spans of as many rows for each ray, zeros where there is no sample."""
        rays = (rays_o, rays_d, t_near, t_far, noise, self.bitfield)
        steps = (self.min_step, self.max_step, self.cone_angle)
        positions, spans = march_morton_rows(
            *rays, self.resolution, self.cascades, self.bound, *steps, limit, bool(self.contract)
        )
        directions = torch.where(spans[..., 1:] > 0, rays_d[:, None], 0.0)
        return positions.view(-1, 3), directions.reshape(-1, 3), spans.view(-1, 2)


def noise_for(rays: Tensor, perturb: bool | int | Tensor) -> Tensor:
    """One number in [0, 1) for each ray, or zeros. A tensor is taken as it is."""
    if isinstance(perturb, Tensor):
        return perturb.detach().float()
    count = rays.shape[0]
    return torch.rand(count, device=rays.device) if perturb else torch.zeros(count, device=rays.device)


def marched_rays(
    op: str, rays_o: Tensor, rays_d: Tensor, nears: Tensor, fars: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rays and where they are followed, float32."""
    origins, directions = as_rays(op, rays_o, rays_d)
    return origins, directions, nears.detach().float().reshape(-1), fars.detach().float().reshape(-1)


class _Hard(torch.autograd.Function):
    """The density of a sample that is wholly opaque or not at all; its gradient is the density's."""

    @staticmethod
    def forward(ctx, density: Tensor, length: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return torch.where(density * length > math.log(2.0), math.inf, 0.0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return grad, None


def binarized(density: Tensor, length: Tensor) -> Tensor:
    """Density with which alpha is 1 where it is above one half, else 0."""
    return _Hard.apply(density, length)


def composite_packed(
    sigmas: Tensor, rgbs: Tensor, t: Tensor, dt: Tensor, rays: Tensor, threshold: float, binarize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, their sum, depth and colour of rays.

    Args:
        sigmas, rgbs: float32 ``[M]``, ``[M, C]``; both get exact gradients.
        t, dt: ``[M]``, distance that counts for the depth, and length of each sample.
        rays: ``[N, 2]`` (offset, count).
        threshold: a ray ends behind the sample that leaves less light than this.
        binarize: see `binarized`.
    """
    count = sigmas.shape[0]
    if getattr(rays, "in_order", False):  # as march_rays_train made them: one behind the other
        offsets, places = torch.nn.functional.pad(rays[:, 0] + rays[:, 1], (1, 0)), None
    else:
        places, _, offsets = samples_of(rays, count)
        # What belongs to no ray is read anywhere, and stands behind the last offset.
        sigmas, rgbs, t, dt = (x[places.clamp(max=max(count - 1, 0))] for x in (sigmas, rgbs, t, dt))
    density = binarized(sigmas, dt) if binarize else sigmas
    if threshold > 0:
        with torch.no_grad():
            _, reaching = weights_from_density(density, dt, offsets)
        density = torch.where(reaching >= min(threshold, 1.0), density, 0.0)
    weights, opacity, depth, colour = composite(density, rgbs, t, dt, offsets)
    if places is not None:
        weights = weights.new_zeros(count + 1).index_put((places,), weights)[:count]
    return weights, opacity, depth, colour


def mark_in_order(rays: Tensor) -> Tensor:
    """The same tensor, which now says that the samples of its rays lie one behind the other."""
    rays.in_order = True  # type: ignore[attr-defined]
    return rays


@torch.no_grad()
def composite_more(
    n_alive: int,
    n_step: int,
    rays_alive: Tensor,
    rays_t: Tensor,
    sigmas: Tensor,
    rgbs: Tensor,
    t: Tensor,
    dt: Tensor,
    weights_sum: Tensor,
    depth: Tensor,
    image: Tensor,
    threshold: float,
    binarize: bool,
) -> None:
    """Composites some more samples of the rays that are alive, in place.

    Args:
        n_alive, n_step: number of rays and of rows for each.
        rays_alive: int32, the rays' numbers; -1 afterwards for one that ended.
        rays_t: where each ray goes on.
        sigmas, rgbs, t, dt: of ``n_alive * n_step`` rows; a row with dt = 0 is behind the ray's end.
        weights_sum, depth, image: of all rays.
        threshold: a ray ends with the first sample that less light than this reaches.
        binarize: see `binarized`.
    """
    rows = (n_alive, n_step)
    alive = rays_alive[:n_alive]
    ray = torch.where(alive >= 0, alive, weights_sum.shape[0]).long()  # those that ended before go nowhere
    t, dt = t.reshape(rows), dt.reshape(rows)
    density = sigmas.float().reshape(rows)
    if binarize:
        density = binarized(density, dt)
    there = (dt != 0).cumprod(dim=1).bool()
    optical = torch.where(there, density.clamp(min=0), 0.0) * dt
    optical = torch.where(there, optical, 0.0)
    before = torch.nn.functional.pad(optical.cumsum(dim=1), (1, 0))[:, :-1]
    held = torch.nn.functional.pad(weights_sum, (0, 1))
    reaching = (1 - held[ray])[:, None] * torch.exp(-before)
    enough = reaching >= threshold
    counts = there & torch.nn.functional.pad(enough, (1, 0), value=True)[:, :-1]
    weights = torch.where(counts, reaching * -torch.expm1(-optical), 0.0)
    colour = (weights[..., None] * rgbs.float().reshape(*rows, -1)).sum(dim=1)
    for total, part in ((weights_sum, weights.sum(dim=1)), (depth, (weights * t).sum(dim=1)), (image, colour)):
        longer = torch.cat([total, total.new_zeros(1, *total.shape[1:])])
        total.copy_(longer.index_add(0, ray, part.to(total.dtype))[:-1])
    goes_on = (there & enough).all(dim=1) & (alive >= 0)
    longer = torch.cat([rays_t, rays_t.new_zeros(1)])
    longer[torch.where(goes_on, ray, rays_t.shape[0])] = t[:, -1].to(rays_t.dtype)
    rays_t.copy_(longer[:-1])
    alive.copy_(torch.where(goes_on, alive, -1))
