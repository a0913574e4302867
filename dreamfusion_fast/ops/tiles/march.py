"""The march for a renderer that streams: how many samples there are, and those of one tile after another.

A tile is a window of the packed samples of `march`, found again by marching the rays that lie in it. So no sample is
held outside the tile in work, and the number of samples need not be known on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dreamfusion_fast.ops._native import call, pointer, strided
from dreamfusion_fast.ops.occupancy import occupancy_unpack

MAX_STEPS = 1 << 24  # steps of one ray; up to here float32 counts them exactly (kMaxSteps in march.h)
_BLOCK = 8  # cells along a block (kBlock in march.h)


@dataclass(frozen=True, eq=False)
class MarchedRays:
    """Rays and the grid they are marched through, as `march` takes them; all tensors contiguous, on one device.

    Attributes:
        origins, directions: `[n_rays, 3]`.
        t_near, t_far: `[n_rays]`, as `ray_box` gives them.
        aabb: `[6]`.
        bitfield: uint8, or None: all cells are occupied.
        blocks: from `occupied_blocks`; None without bitfield.
        resolution, step, jitter, cascades: as in `march`.
        seed: as in `march`, or an int64 tensor `[]` on the device, which a CUDA graph reads anew at each replay.
        distances: `[n + 1]` as in `march_lattice`, or None: equal steps.
    """

    origins: Tensor
    directions: Tensor
    t_near: Tensor
    t_far: Tensor
    aabb: Tensor
    bitfield: Tensor | None
    blocks: Tensor | None
    resolution: int
    step: float
    jitter: bool
    seed: int | Tensor
    cascades: int = 1
    distances: Tensor | None = None

    def __len__(self) -> int:
        return self.origins.shape[0]

    @cached_property
    def arguments(self) -> tuple[int | float | bool, ...]:
        """As the native core takes it."""
        tensors = (self.origins, self.directions, self.t_near, self.t_far, self.aabb, self.distances)
        n_steps = MAX_STEPS if self.distances is None else self.distances.shape[0] - 1
        grid = (pointer(self.bitfield), pointer(self.blocks), self.resolution, self.cascades)
        seed = (0, pointer(self.seed)) if isinstance(self.seed, Tensor) else (self.seed, 0)
        return (*map(pointer, tensors), n_steps, *grid, self.step, self.jitter, *seed, len(self))


@dataclass(frozen=True, eq=False)
class KeptSamples:
    """Some of the samples that a march finds.

    Attributes:
        flags: uint8 `[marched samples]`, 1 where a sample is kept.
        marched: int32 `[n_rays + 1]`, prefix sum of the samples that were marched.
    """

    flags: Tensor
    marched: Tensor


def occupied_blocks(bitfield: Tensor, resolution: int, cascades: int = 1) -> Tensor:
    """Which blocks of 8^3 cells hold an occupied one, uint8 `[cascades * ceil(resolution / 8)^3]`."""
    blocks = bitfield.new_empty(cascades * ((resolution + _BLOCK - 1) // _BLOCK) ** 3)
    call("march_blocks", bitfield, pointer(bitfield), resolution, cascades, pointer(blocks))
    return blocks


def count_samples(rays: MarchedRays) -> tuple[Tensor, Tensor]:
    """Samples of each ray, and the number k of its first one: int32 `[n_rays]` each."""
    counts, firsts = rays.origins.new_empty((2, len(rays)), dtype=torch.int32)
    if len(rays) > 0:
        call("march_count", rays.origins, rays.arguments, pointer(counts), pointer(firsts))
    return counts, firsts


def march_totals(rays: MarchedRays, counts: Tensor, tolerance: float) -> Tensor:
    """Samples of all rays, and how many rays are not finite or not of unit length: int64 `[2]`.

    Args:
        rays: what was marched.
        counts: int32 `[n_rays]`.
        tolerance: how far the square of a direction's length may be off 1.
    """
    totals = counts.new_zeros(2, dtype=torch.int64)
    if len(rays) > 0:
        tensors = (pointer(counts), pointer(rays.origins), pointer(rays.directions))
        call("march_totals", rays.origins, *tensors, tolerance, pointer(totals), len(rays))
    return totals


def march_tile(
    rays: MarchedRays,
    firsts: Tensor,
    offsets: Tensor,
    ray_range: Tensor,
    first: int,
    t: Tensor,
    lengths: Tensor | None,
    positions: Tensor,
    box: Sequence[float],
    kept: KeptSamples | None = None,
) -> None:
    """Write the samples `first <= i < first + capacity` of all the rays', as far as there are any.

    Args:
        rays: what is marched.
        firsts: int32 `[n_rays]` from `count_samples`.
        offsets: int32 `[n_rays + 1]`, prefix sum of the counts, or of smaller counts: then of each ray's first samples,
            or with `kept` of those that are kept.
        ray_range: int32 `[2]`, the rays that have samples in this tile: first, and one past the last.
        first: the tile's first sample.
        t: `[capacity]`, written: distances.
        lengths: `[capacity]`, written: lengths; None without `rays.distances`.
        positions: `[capacity, 3]` of any strides, written: positions in `box` scaled to [0, 1]^3.
        box: six numbers, the box of the field that is asked; that of the grid may be another.
        kept: which samples are wanted; None: all.
    """
    call(
        "march_tile",
        rays.origins,
        rays.arguments,
        pointer(firsts),
        pointer(offsets),
        pointer(None if kept is None else kept.marched),
        pointer(None if kept is None else kept.flags),
        pointer(ray_range),
        pointer(t),
        pointer(lengths),
        strided(positions),
        box,
        first,
        t.shape[0],
    )


# Columns of a tile table (march_tile.h): a tile's rays, first and one past the last, and its number of samples.
_COLUMNS = 8
_RAYS = slice(0, 2)
_COUNT = slice(4, 5)


def tile_table(offsets: Tensor, size: int, n_tiles: int) -> list[tuple[Tensor, Tensor]]:
    """The numbers that the kernels of each tile read about it; nothing of it is known on the host.

    Args:
        offsets: int32 `[n_rays + 1]`, first sample of each ray, contiguous.
        size: samples per tile.
        n_tiles: how many tiles, from the first.

    Returns:
        For each tile int32 `[2]`, the rays that have samples in it: first, and one past the last; and int32 `[1]`, its
        number of samples.
    """
    table = offsets.new_empty(n_tiles, _COLUMNS)
    if n_tiles > 0:
        call("tile_table", offsets, pointer(offsets), pointer(table), offsets.shape[0] - 1, size, n_tiles)
    return [(row[_RAYS], row[_COUNT]) for row in table.unbind()]


def occupied_blocks_reference(bitfield: Tensor, resolution: int, cascades: int = 1) -> Tensor:
    """The PyTorch twin of `occupied_blocks`."""
    grid = occupancy_unpack(bitfield, resolution, cascades).view(cascades, *[resolution] * 3).float()
    return torch.nn.functional.max_pool3d(grid, _BLOCK, ceil_mode=True).view(-1).to(torch.uint8)


def count_samples_reference(rays: MarchedRays) -> tuple[Tensor, Tensor]:
    """The PyTorch twin of `count_samples`; 0 is the first sample of a ray that has none."""
    from dreamfusion_fast.ops.march import offset_reference  # which imports this module

    offsets, t, _ = _march_reference(rays)
    counts = offsets.diff()
    first = torch.cat([t, t.new_zeros(1)])[offsets[:-1].long()]
    u = offset_reference(rays.origins, rays.jitter, int(rays.seed))
    if rays.distances is None:
        k = ((first - rays.t_near) / rays.step - u).round()
    else:
        k = (rays.distances[:-1] + u[:, None] * rays.distances.diff() < first[:, None]).sum(1)
    return counts, torch.where(counts > 0, k, 0).to(torch.int32)


def march_totals_reference(rays: MarchedRays, counts: Tensor, tolerance: float) -> Tensor:
    """The PyTorch twin of `march_totals`."""
    valid = rays.origins.isfinite().all(1) & ((rays.directions.square().sum(1) - 1).abs() <= tolerance)
    return torch.stack([counts.sum(), (~valid).sum()])


def march_tile_reference(
    rays: MarchedRays,
    firsts: Tensor,
    offsets: Tensor,
    ray_range: Tensor,
    first: int,
    t: Tensor,
    lengths: Tensor | None,
    positions: Tensor,
    box: Sequence[float],
    kept: KeptSamples | None = None,
) -> None:
    """The PyTorch twin of `march_tile`: marches everything, and needs neither `firsts` nor `ray_range`."""
    starts, every_t, every_length = _march_reference(rays)
    offsets = offsets.long()
    if kept is not None:
        flags = kept.flags[: every_t.shape[0]].bool()
        starts, every_t, every_length = offsets, every_t[flags], every_length[flags]
    sample = torch.arange(first, min(first + t.shape[0], int(offsets[-1])), device=t.device)
    ray = torch.searchsorted(offsets, sample, right=True) - 1
    source, n = starts[ray] + sample - offsets[ray], sample.shape[0]
    t[:n] = every_t[source]
    if lengths is not None:
        lengths[:n] = every_length[source]
    low, high = positions.new_tensor(box).split(3)
    positions[:n] = (rays.origins[ray] + t[:n, None] * rays.directions[ray] - low) / (high - low)


def tile_table_reference(offsets: Tensor, size: int, n_tiles: int) -> list[tuple[Tensor, Tensor]]:
    """The PyTorch twin of `tile_table`."""
    first = torch.arange(n_tiles, dtype=torch.int32, device=offsets.device) * size
    low = torch.searchsorted(offsets[1:], first, right=True, out_int32=True)
    high = torch.searchsorted(offsets[:-1], first + size, out_int32=True)
    counts = (offsets[-1] - first).clamp(0, size)
    return list(zip(torch.stack([low, high], 1).unbind(), counts[:, None].unbind(), strict=True))


def _march_reference(rays: MarchedRays) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets, distances and lengths of all samples."""
    from dreamfusion_fast.ops.march import march_lattice_reference, march_reference  # which imports this module

    given = (rays.origins, rays.directions, rays.t_near, rays.t_far, rays.aabb, rays.bitfield, rays.resolution)
    options = (rays.jitter, int(rays.seed), rays.cascades)
    if rays.distances is None:
        offsets, t, _ = march_reference(*given, rays.step, *options)
        return offsets, t, torch.full_like(t, rays.step)
    offsets, t, _, lengths = march_lattice_reference(*given, rays.distances, *options)
    return offsets, t, lengths
