"""The march for tiles against its twins: blocks, counts, totals, the table of tiles and the samples of each."""

from __future__ import annotations

import math

import pytest
import torch
from marching import OTHER_BOX, make_bits, make_rays
from torch import Tensor

from dreamfusion_fast.ops import occupancy_pack, ray_box
from dreamfusion_fast.ops.tiles.march import (
    KeptSamples,
    MarchedRays,
    count_samples,
    count_samples_reference,
    march_tile,
    march_tile_reference,
    march_totals,
    march_totals_reference,
    occupied_blocks,
    occupied_blocks_reference,
    tile_table,
    tile_table_reference,
)

N_RAYS = 113
UNTOUCHED = -7.0


def marched(kind: str, device: torch.device, dtype: torch.dtype = torch.float32, share: float = 0.3) -> MarchedRays:
    """Rays through a grid at random: with equal steps, from a seed on the device, or with steps and cascades."""
    resolution, cascades = (8, 3) if kind == "cascades" else (13, 1)
    origins, directions = make_rays(N_RAYS, dtype, device)
    aabb = torch.tensor(OTHER_BOX, dtype=dtype, device=device)
    t_near, t_far = ray_box(origins, directions, aabb, far=5.0)
    if kind == "cascades":
        t_near, t_far = torch.full_like(t_near, 0.1), torch.full_like(t_far, 6.0)
    bits = make_bits(resolution, share, device, cascades)
    blocks = occupied_blocks(bits, resolution, cascades)
    seed = torch.tensor(12345678901, device=device) if kind == "seed on the device" else 7
    distances = torch.linspace(0.1, 2.5, 60, dtype=dtype, device=device).square() if kind == "cascades" else None
    grid = (aabb, bits, blocks, resolution, 0.0371, kind != "equal steps", seed, cascades, distances)
    return MarchedRays(origins, directions, t_near, t_far, *grid)


every_kind = pytest.mark.parametrize("kind", ["equal steps", "seed on the device", "cascades"])


@pytest.mark.parametrize(("resolution", "cascades"), [(1, 1), (3, 1), (8, 1), (13, 1), (20, 3), (64, 1)])
def test_blocks_are_those_with_an_occupied_cell(resolution: int, cascades: int, device: torch.device) -> None:
    for share in (0.0, 0.003, 0.5):
        bits = make_bits(resolution, share, device, cascades)
        assert torch.equal(
            occupied_blocks(bits, resolution, cascades), occupied_blocks_reference(bits, resolution, cascades)
        )
    corner = torch.zeros(13, 13, 13, device=device)
    corner[8, 0, 12] = 1.0
    assert occupied_blocks(occupancy_pack(corner, 0.5), 13).tolist() == [0, 0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_kind
def test_counts_are_those_of_the_twin(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    rays = marched(kind, device, dtype)
    for found, expected in zip(count_samples(rays), count_samples_reference(rays), strict=True):
        assert found.dtype == torch.int32
        assert torch.equal(found, expected)
    assert int(count_samples(rays)[1].max()) > 0


def test_totals_count_samples_and_invalid_rays(device: torch.device) -> None:
    rays = marched("equal steps", device)
    rays.directions[rays.directions.norm(dim=1) < 1.0] = 2.0
    rays.origins[3, 1], rays.directions[5, 2] = math.nan, math.inf
    counts, _ = count_samples(rays)
    totals = march_totals(rays, counts, 1e-3)
    assert torch.equal(totals, march_totals_reference(rays, counts, 1e-3))
    assert totals.tolist()[0] == int(counts.sum())
    assert totals.tolist()[1] > 2


@pytest.mark.parametrize("size", [1, 7, 113, 1023])
@pytest.mark.parametrize("counts", [[], [0, 0], [5], [0, 1, 5, 0, 70, 33, 113, 2, 64, 0]])
def test_the_table_has_rays_and_samples_of_each_tile(counts: list[int], size: int, device: torch.device) -> None:
    """Tiles beyond the last sample among them."""
    offsets = torch.tensor([0, *counts], device=device).cumsum(0).to(torch.int32)
    n_tiles = sum(counts) // size + 3
    found, expected = tile_table(offsets, size, n_tiles), tile_table_reference(offsets, size, n_tiles)
    assert len(found) == len(expected) == n_tiles
    for (rays, count), (twin_rays, twin_count) in zip(found, expected, strict=True):
        assert rays.tolist() == twin_rays.tolist()
        assert count.tolist() == twin_count.tolist()
    assert sum(int(count) for _, count in found) == sum(counts)
    assert tile_table(offsets, size, 0) == tile_table_reference(offsets, size, 0) == []


def tile_buffers(rays: MarchedRays, size: int) -> tuple[Tensor, Tensor | None, Tensor]:
    like = rays.origins
    lengths = None if rays.distances is None else like.new_full((size,), UNTOUCHED)
    return like.new_full((size,), UNTOUCHED), lengths, like.new_full((3, size), UNTOUCHED).t()


@pytest.mark.parametrize("size", [32, 113, 5003])
@pytest.mark.parametrize("which", ["all", "first", "some"])
@every_kind
def test_tiles_have_the_samples_of_the_twin(kind: str, which: str, size: int, device: torch.device) -> None:
    """All of them, or of each ray only the first few, as after an early stop, or any of them."""
    rays = marched(kind, device)
    counts, firsts = count_samples(rays)
    kept = None
    if which == "first":
        counts = counts.clamp(max=5)
    elif which == "some":
        total, all_offsets = int(counts.sum()), torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        flags = (torch.rand(total, generator=torch.Generator().manual_seed(3)) < 0.4).to(device, torch.uint8)
        kept = KeptSamples(flags, all_offsets.to(torch.int32))
        counts = torch.nn.functional.pad(flags.cumsum(0), (1, 0))[all_offsets].diff()
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    n_tiles = -(-int(offsets[-1]) // size)
    assert n_tiles > 0
    box = (-2.0, -1.0, -3.0, 1.0, 2.0, 2.5)
    for k, (ray_range, count) in enumerate(tile_table(offsets, size, n_tiles)):
        results = [tile_buffers(rays, size) for _ in range(2)]
        for march, (t, lengths, positions) in zip((march_tile, march_tile_reference), results, strict=True):
            march(rays, firsts, offsets, ray_range, k * size, t, lengths, positions, box, kept)
        (t, lengths, positions), expected = results
        assert torch.equal(t, expected[0])
        assert lengths is None or torch.equal(lengths, expected[1])
        torch.testing.assert_close(positions, expected[2], rtol=1e-6, atol=1e-6)
        assert (t[int(count) :] == UNTOUCHED).all()
