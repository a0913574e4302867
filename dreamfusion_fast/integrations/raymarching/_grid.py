"""Functions of both flavours of raymarching: rays and boxes, Morton order, bitfields, lists of rays."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dreamfusion_fast.ops._checks import check_number, check_tensor
from dreamfusion_fast.ops.march_morton import morton_cells, morton_index
from dreamfusion_fast.ops.occupancy import mark_order, occupancy_pack, occupancy_unpack
from dreamfusion_fast.ops.ray_box import ray_box

MISSED = torch.finfo(torch.float32).max


def as_rays(op: str, rays_o: Tensor, rays_d: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float32 ``[N, 3]``, without gradients."""
    for name, rays in (("rays_o", rays_o), ("rays_d", rays_d)):
        if not isinstance(rays, Tensor) or rays.shape[-1:] != (3,):
            got = list(rays.shape) if isinstance(rays, Tensor) else type(rays).__name__
            raise ValueError(f"{op}: {name} must be a tensor [..., 3], got {got}")
    return rays_o.detach().float().reshape(-1, 3), rays_d.detach().float().reshape(-1, 3)


@torch.no_grad()
def near_far_from_aabb(rays_o: Tensor, rays_d: Tensor, aabb: Tensor, min_near: float = 0.2) -> tuple[Tensor, Tensor]:
    """Distances at which rays enter and leave a box.

    Args:
        rays_o, rays_d: ``[N, 3]``, or ``[..., 3]`` of N rays together.
        aabb: ``[6]`` (xmin, ymin, zmin, xmax, ymax, zmax).
        min_near: no ray enters before it.

    Returns:
        ``nears``, ``fars``, float32 ``[N]``; for a ray that misses the box the largest float32, both.
    """
    origins, directions = as_rays("near_far_from_aabb", rays_o, rays_d)
    check_number("near_far_from_aabb", "min_near", min_near, "a number", lambda number: not math.isnan(number))
    enter, leave = ray_box(origins, directions, aabb.detach().float(), -math.inf)
    missed = leave == math.inf
    return torch.where(missed, MISSED, enter.clamp(min=min_near)), torch.where(missed, MISSED, leave)


@torch.no_grad()
def sph_from_ray(rays_o: Tensor, rays_d: Tensor, radius: float) -> Tensor:
    """Where rays from within a sphere about the origin meet it, as angles, with y up.

    Args:
        rays_o, rays_d: ``[N, 3]``, or ``[..., 3]`` of N rays together.
        radius: of the sphere.

    Returns:
        float32 ``[N, 2]`` in [-1, 1]: ``2 theta / pi - 1`` and ``phi / pi``, theta from the y axis, phi from x to z.
    """
    origins, directions = as_rays("sph_from_ray", rays_o, rays_d)
    a, b = directions.square().sum(dim=1), (origins * directions).sum(dim=1)
    c = origins.square().sum(dim=1) - radius * radius
    t = (-b + (b * b - a * c).sqrt()) / a
    x, y, z = (origins + t[:, None] * directions).unbind(dim=1)
    theta, phi = torch.atan2((x * x + z * z).sqrt(), y), torch.atan2(z, x)
    return torch.stack([2 / math.pi * theta - 1, phi / math.pi], dim=1)


def morton3D(coords: Tensor) -> Tensor:  # noqa: N802 - their name
    """Places of cells ``[N, 3]``, each in [0, 1024), in Morton order, int32 ``[N]``; that of x is the lowest bit."""
    return morton_index(coords.detach()).to(torch.int32)


def morton3D_invert(indices: Tensor) -> Tensor:  # noqa: N802 - their name
    """The cells int32 ``[N, 3]`` of places in Morton order ``[N]``."""
    return morton_cells(indices.detach()).to(torch.int32)


@torch.no_grad()
def packbits(grid: Tensor, thresh: float | Tensor, bitfield: Tensor | None = None) -> Tensor:
    """One bit per cell: bit i of byte b tells whether cell ``8 b + i`` is above the threshold.

    The bitfield is marked as one in Morton order, and our own ops, whose order is another, refuse it.

    Args:
        grid: ``[C, H^3]``, densities of C cascades in Morton order.
        thresh: a number, or a tensor of one element.
        bitfield: uint8 ``[C H^3 / 8]`` to write to; None = a new one.

    Returns:
        The bitfield: the tensor that was given, if one was.
    """
    check_tensor("packbits", "grid", grid, ["C", "H^3"], (torch.float16, torch.bfloat16, torch.float32, torch.float64))
    cells = grid.numel()
    if cells % 8 != 0:
        raise ValueError(f"packbits: grid must have a multiple of 8 cells, got {list(grid.shape)}")
    threshold = thresh.reshape(()) if isinstance(thresh, Tensor) else thresh
    # The rows of bits are the same whatever the shape of the grid: as cubes of 2^3 cells it always fits.
    packed = occupancy_pack(grid.detach().float().reshape(-1, 2, 2, 2), threshold)
    if bitfield is None:
        return mark_order(packed, "morton")
    check_tensor("packbits", "bitfield", bitfield, [cells // 8], (torch.uint8,), like=grid)
    return mark_order(bitfield.copy_(packed), "morton")


@torch.no_grad()
def morton_bitfield(bitfield: Tensor, resolution: int, cascades: int = 1) -> Tensor:
    """A bitfield of this package's `OccupancyGrid` in Morton order, for the functions here.

    Beyond one cascade the boxes are the same only where the scene's bound is ``2^(cascades - 1)``.

    Args:
        bitfield: uint8 ``[cascades * resolution^3 / 8]`` as `occupancy_pack` makes it.
        resolution: cells along an axis, a power of two from 2 to 1024.
        cascades: number of grids.
    """
    if resolution not in [2**bits for bits in range(1, 11)]:
        raise ValueError(f"morton_bitfield: resolution must be a power of two from 2 to 1024, got {resolution!r}")
    grid = occupancy_unpack(bitfield, resolution, cascades).view(cascades, -1)
    x, y, z = morton_cells(torch.arange(resolution**3, device=bitfield.device)).unbind(dim=1)
    return packbits(grid[:, (x * resolution + y) * resolution + z].float(), 0.5)


def flatten_rays(rays: Tensor, M: int) -> Tensor:  # noqa: N803 - their name
    """The ray of each sample.

    Args:
        rays: int32 ``[N, 2]``, of each ray the first sample and their number.
        M: number of samples; those of no ray are given to ray 0.

    Returns:
        int32 ``[M]``.
    """
    places, ray, _ = samples_of(rays.detach(), M)
    found = torch.zeros(M + 1, dtype=torch.int32, device=rays.device)
    return found.index_copy_(0, places, ray.to(torch.int32))[:M]


def samples_of(rays: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The samples of rays one behind the other, whatever their order in memory. It waits for no GPU.

    Args:
        rays: integers ``[N, 2]`` (offset, count). A ray that reaches beyond the samples counts as empty.
        count: number of samples, M.

    Returns:
        ``places`` int64 ``[M]``, of each the index in memory, M for what is left over; ``ray`` int64 ``[M]``;
        ``offsets`` int32 ``[N + 1]``, where the samples of each ray begin in this new order.
    """
    first, number = rays[:, 0].long(), rays[:, 1].long()
    number = torch.where((first < 0) | (first + number > count), 0, number)
    offsets = torch.nn.functional.pad(number.cumsum(0), (1, 0))
    new = torch.arange(count, device=rays.device)
    if rays.shape[0] == 0:
        return torch.full_like(new, count), torch.zeros_like(new), offsets.to(torch.int32)
    ray = torch.searchsorted(offsets[1:], new, right=True).clamp(max=rays.shape[0] - 1)
    places = torch.where(new < offsets[-1], first[ray] + new - offsets[ray], count)
    return places, ray, offsets.clamp(max=count).to(torch.int32)
