"""The march for a renderer that streams: how many samples there are, and those of one tile after another.

A tile is a window of the packed samples of `march`, found again by marching the rays that lie in it. So no sample is
held outside the tile in work, and the number of samples need not be known on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dreamfusion_fast.ops._marched_rays import MarchedRays
from dreamfusion_fast.ops._native import call, pointer, strided


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
) -> None:
    """Write the samples `first <= i < first + capacity` of all the rays', as far as there are any.

    Args:
        rays: what is marched.
        firsts: int32 `[n_rays]` from `count_samples`.
        offsets: int32 `[n_rays + 1]`, prefix sum of the counts, or of smaller counts: then of each ray's first samples.
        ray_range: int32 `[2]`, the rays that have samples in this tile: first, and one past the last.
        first: the tile's first sample.
        t: `[capacity]`, written: distances.
        lengths: `[capacity]`, written: lengths; None without `rays.distances`.
        positions: `[capacity, 3]` of any strides, written: positions in `box` scaled to [0, 1]^3.
        box: six numbers, the box of the field that is asked; that of the grid may be another.
    """
    call(
        "march_tile",
        rays.origins,
        *rays.arguments,
        pointer(firsts),
        pointer(offsets),
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
