"""The march through grids in Morton order: native core against the twin, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from marching import assert_same, make_rays
from morton_rules import written_out
from torch import Tensor

from dreamfusion_fast.ops import (
    march_morton,
    march_morton_reference,
    march_morton_rows,
    march_morton_rows_reference,
    occupancy_pack,
)
from dreamfusion_fast.ops.march_morton import morton_cells, morton_index
from dreamfusion_fast.rendering import OccupancyGrid


def scene(
    n: int, resolution: int, cascades: int, dtype: torch.dtype, device: torch.device, share: float = 0.3
) -> tuple[object, ...]:
    origins, directions = make_rays(n, dtype, device, spread=0.8)
    t_near = torch.rand(n, dtype=torch.float64).to(device, dtype) * 0.3
    t_far = (4 * torch.rand(n, dtype=torch.float64)).to(device, dtype)
    t_near[::5], t_far[::5] = torch.finfo(dtype).max, torch.finfo(dtype).max  # a miss
    noise = torch.rand(n, dtype=dtype, device=device)
    bits = torch.rand(cascades * resolution**3 // 8, 8) < share
    bitfield = (bits * 2 ** torch.arange(8)).sum(dim=1).to(torch.uint8)
    return origins, directions, t_near, t_far, noise, bitfield.to(device), resolution, cascades


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n", "resolution", "cascades", "bound"), [(0, 2, 1, 1), (1, 4, 2, 2), (113, 8, 3, 3.0), (1023, 32, 2, 1.5)]
)
@pytest.mark.parametrize("contract", [False, True])
def test_equals_the_twin(
    contract: bool, n: int, resolution: int, cascades: int, bound: float, dtype: torch.dtype, device: torch.device
) -> None:
    for share, steps in ((0.3, (0.02, 0.5, 0.0)), (0.02, (0.01, 0.9, 0.1)), (1.0, (0.3, 0.3, 0.02))):
        rays = scene(n, resolution, cascades, dtype, device, share)
        found = march_morton(*rays, bound, *steps, 1024, contract)
        assert_same(found, march_morton_reference(*rays, bound, *steps, 1024, contract))
        assert n < 100 or found[1].shape[0] > 5
        assert_same(
            march_morton_rows(*rays, bound, *steps, 5, contract),
            march_morton_rows_reference(*rays, bound, *steps, 5, contract),
        )


@pytest.mark.parametrize("contract", [False, True])
@pytest.mark.parametrize(("resolution", "cascades", "bound", "angle"), [(8, 2, 2.0, 0.02), (16, 3, 3.0, 0.1)])
def test_equals_the_rules_written_out(
    resolution: int, cascades: int, bound: float, angle: float, contract: bool, device: torch.device
) -> None:
    """In double precision every sample of every ray, whatever the cascade that place or step choose."""
    n, most = 60, 200
    origins, _, t_near, t_far, noise, bits, *_ = scene(n, resolution, cascades, torch.float64, device)
    # Not along walls, where what a rounding decides is another matter.
    origins = 1.5 * origins + 0.01 * torch.rand_like(origins)
    directions = torch.nn.functional.normalize(torch.rand_like(origins) - 0.5 - origins, dim=1)
    bound_steps = 2 * math.sqrt(3) / most, 2 * math.sqrt(3) * bound / resolution
    arguments = (origins, directions, t_near, t_far, noise, bits, resolution, cascades, bound, *bound_steps, angle)
    offsets, positions, spans, _ = march_morton(*arguments, most, contract)
    occupied = (bits[:, None] >> torch.arange(8, device=device) & 1).bool().view(cascades, -1).tolist()
    for ray in range(n):
        wanted = written_out(
            origins[ray].tolist(),
            directions[ray].tolist(),
            float(t_near[ray]),
            float(t_far[ray]),
            occupied,
            bound,
            resolution,
            angle,
            most,
            most,
            bound,
            float(noise[ray]),
            contract,
        )
        mine = slice(int(offsets[ray]), int(offsets[ray + 1]))
        found = torch.cat([positions[mine], spans[mine]], dim=1).cpu()
        rows = [[*sample[0], *sample[1:]] for sample in wanted]
        expected = torch.tensor(rows, dtype=torch.float64).view(-1, 5)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert len(spans) > 100


def test_rows_are_the_first_samples(device: torch.device) -> None:
    rays = scene(113, 16, 2, torch.float32, device)
    offsets, positions, spans, ray_indices = march_morton(*rays, 2.0, 0.02, 0.2, 0.01)
    rows = march_morton_rows(*rays, 2.0, 0.02, 0.2, 0.01, 7)
    place = torch.arange(len(spans), device=device) - offsets[ray_indices.long()]
    first = place < 7
    assert torch.equal(rows[0][ray_indices[first].long(), place[first]], positions[first])
    assert torch.equal(rows[1][ray_indices[first].long(), place[first]], spans[first])
    assert int((rows[1][..., 1] > 0).sum()) == int(first.sum())
    few = march_morton(*rays, 2.0, 0.02, 0.2, 0.01, 7)
    assert torch.equal(few[2], spans[first])


def test_morton_order() -> None:
    cells = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [3, 0, 0], [5, 6, 7], [1023, 1023, 1023]])
    by_hand = [0, 1, 2, 4, 9, 0b111_110_101, 2**30 - 1]
    assert morton_index(cells).tolist() == by_hand
    every = torch.randint(0, 1024, (1023, 3))
    assert torch.equal(morton_cells(morton_index(every)), every)


def test_a_bitfield_in_the_other_order_is_refused(device: torch.device) -> None:
    *rays, _, resolution, cascades = scene(3, 8, 1, torch.float32, device)
    grid = OccupancyGrid(resolution=8).to(device)
    for linear in (occupancy_pack(torch.rand(8, 8, 8, device=device), 0.5), grid.bitfield):
        with pytest.raises(ValueError, match="march_morton: bitfield must have its cells in morton order"):
            march_morton(*rays, linear, resolution, cascades, 1.0, 0.1, 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype: torch.dtype, device: torch.device) -> None:
    arguments = (*scene(7, 4, 1, dtype, device), 1.0, 0.1, 0.1, 0.0, 9, False)
    torch.library.opcheck(torch.ops.dreamfusion_fast.march_morton.default, arguments)
    torch.library.opcheck(torch.ops.dreamfusion_fast.march_morton_rows.default, arguments)


def test_strided_arguments(device: torch.device) -> None:
    origins, directions, *others = scene(113, 8, 1, torch.float32, device)
    numbers = [torch.stack([x, x], dim=1)[:, 0] if isinstance(x, Tensor) else x for x in others]
    turned = (origins.t().contiguous().t(), directions.t().contiguous().t())
    expected = march_morton(origins, directions, *others, 1.0, 0.05, 0.1)
    assert_same(march_morton(*turned, *numbers, 1.0, 0.05, 0.1), expected)


def test_rays_that_end_nowhere(device: torch.device) -> None:
    """They take at most 2^24 steps, and where a step is lost in the distance's rounding, none."""
    _, _, _, _, noise, bits, resolution, cascades = scene(4, 4, 1, torch.float32, device, share=0.0)
    origins, directions = torch.zeros(4, 3, device=device), torch.zeros(4, 3, device=device)
    t_near = torch.tensor([1e30, math.nan, math.inf, -math.inf], device=device)
    t_far = torch.full((4,), math.inf, device=device)
    offsets = march_morton(origins, directions, t_near, t_far, noise, bits, resolution, cascades, 1.0, 0.1, 0.1)[0]
    assert offsets.tolist() == [0] * 5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"noise": torch.rand(2)}, ValueError, "noise has 2 rows, origins has 3"),
        ({"resolution": 6}, ValueError, "resolution must be a power of two from 2 to 1024, got 6"),
        ({"cascades": 2}, ValueError, r"bitfield must have shape \[128\], got \[64\]"),
        ({"bound": 0}, ValueError, "bound must be positive and finite, got 0"),
        ({"min_step": -1.0}, ValueError, "min_step must be positive and finite, got -1.0"),
        ({"limit": 0}, ValueError, "limit must be between 1 and"),
        ({"contract": 2}, TypeError, "contract must be True or False, got 2"),
    ],
)
def test_wrong_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    names = ("origins", "directions", "t_near", "t_far", "noise", "bitfield", "resolution", "cascades")
    arguments = dict(zip(names, scene(3, 8, 1, torch.float32, torch.device("cpu")), strict=True))
    arguments |= {"bound": 1.0, "min_step": 0.1, "max_step": 0.1}
    with pytest.raises(error, match=f"march_morton: {message}"):
        march_morton(**{**arguments, **change})  # type: ignore[arg-type]
