from __future__ import annotations

import math

import pytest
import torch

from dreamfusion_fast.ops import (
    occupancy_pack,
    occupancy_pack_reference,
    occupancy_unpack,
    occupancy_update,
    occupancy_update_reference,
)
from dreamfusion_fast.ops.occupancy import _occupancy_pack, _occupancy_update

RESOLUTIONS = [1, 3, 8, 13, 32]


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("n", [0, 1, 113, 1023])
def test_update_equals_its_twin(resolution: int, index_dtype: torch.dtype, n: int, device: torch.device) -> None:
    # Few cells and many indices, so that most are listed several times; some values below zero.
    grid = (torch.rand(resolution, resolution, resolution) - 0.2).to(device)
    cells = torch.randint(0, resolution**3, (n,), dtype=index_dtype).to(device)
    density = (torch.rand(n) - 0.2).to(device)
    expected = grid.clone()
    occupancy_update_reference(expected, cells, density, 0.95)
    occupancy_update(grid, cells, density, 0.95)
    assert torch.equal(grid, expected)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_update_of_all_cells_equals_listing_them(resolution: int, device: torch.device) -> None:
    grid = torch.rand(resolution, resolution, resolution, device=device)
    density = torch.rand(resolution**3, device=device)
    listed, twin = grid.clone(), grid.clone()
    occupancy_update(grid, None, density, 0.5)
    occupancy_update(listed, torch.arange(resolution**3, device=device), density, 0.5)
    occupancy_update_reference(twin, None, density, 0.5)
    assert torch.equal(grid, listed)
    assert torch.equal(grid, twin)


def test_update_by_hand(device: torch.device) -> None:
    grid = torch.full((2, 2, 2), 1.0, device=device)
    cells = torch.tensor([3, 3, 3, 6], device=device)
    density = torch.tensor([0.7, 2.0, 0.1, 0.1], device=device)
    occupancy_update(grid, cells, density, 0.5)
    # Cell 3 takes the largest; 6 decays once; the others are left alone.
    assert grid.view(-1).tolist() == [1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 0.5, 1.0]
    occupancy_update(grid, torch.tensor([6, 6], device=device), torch.full((2,), torch.nan, device=device), 0.5)
    assert grid[1, 1, 0].item() == 0.25


def test_update_of_cells_that_are_not_known(device: torch.device) -> None:
    nan, inf = math.nan, math.inf
    before = torch.tensor([nan, nan, nan, nan, 1.0, nan, -2.0, inf], device=device).view(2, 2, 2)
    cells = torch.tensor([0, 1, 1, 2, 2, 4, 4, 5, 6, 7], device=device)
    density = torch.tensor([3.0, nan, -4.0, nan, nan, nan, 0.1, -inf, nan, 5.0], device=device)
    expected = [3.0, 0.0, nan, nan, 0.5, 0.0, -2.0, inf]
    for update in (occupancy_update, occupancy_update_reference):
        grid = before.clone()
        update(grid, cells, density, 0.5)
        torch.testing.assert_close(grid.view(-1).cpu(), torch.tensor(expected), equal_nan=True, rtol=0, atol=0)
        grid = before.clone()
        update(grid, None, torch.tensor([3.0, nan, -4.0, 0.0, nan, -inf, nan, nan], device=device), 0.5)
        expected_of_all = torch.tensor([3.0, nan, 0.0, 0.0, 0.5, 0.0, -2.0, inf])
        torch.testing.assert_close(grid.view(-1).cpu(), expected_of_all, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("all_cells", [False, True])
def test_cells_below_zero_stay(all_cells: bool, device: torch.device) -> None:
    grid = torch.rand(8, 8, 8, device=device)
    hidden = torch.rand(8, 8, 8, device=device) < 0.3
    grid[hidden] = -1.0
    cells = None if all_cells else torch.randint(0, 512, (2000,), device=device)
    density = 5 * torch.rand(512 if all_cells else 2000, device=device) - 1
    for _ in range(3):
        occupancy_update(grid, cells, density, 0.5)
    assert (grid[hidden] == -1.0).all()
    assert (grid[~hidden] >= 0).all()
    assert grid.max() > 1


def test_update_takes_strided_density(device: torch.device) -> None:
    grid, other = torch.zeros(4, 4, 4, device=device), torch.zeros(4, 4, 4, device=device)
    cells, density = torch.arange(0, 64, 2, device=device), torch.rand(64, device=device)
    occupancy_update(grid, cells, density[::2], 1.0)
    occupancy_update(other, cells, density[::2].contiguous(), 1.0)
    assert torch.equal(grid, other)
    assert torch.equal(grid.view(-1)[::2], density[::2])


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.5, 2.0])
def test_pack_equals_its_twin_and_unpacks(resolution: int, threshold: float, device: torch.device) -> None:
    grid = torch.rand(resolution, resolution, resolution, device=device)
    grid[0, 0, 0] = threshold  # not above itself
    bits = occupancy_pack(grid, threshold)
    assert bits.shape == ((resolution**3 + 7) // 8,)
    assert torch.equal(bits, occupancy_pack_reference(grid, threshold))
    assert torch.equal(bits, occupancy_pack(grid, torch.tensor(threshold, device=device)))
    assert torch.equal(occupancy_unpack(bits, resolution), grid > threshold)


def test_pack_order_of_bits(device: torch.device) -> None:
    grid = torch.zeros(3, 3, 3, device=device)
    grid[0, 0, 1] = grid[1, 0, 0] = grid[2, 2, 2] = 1.0  # cells 1, 9 and 26
    assert occupancy_pack(grid, 0.5).tolist() == [2, 2, 0, 4]
    assert torch.equal(occupancy_pack(grid.permute(2, 1, 0), 0.5), occupancy_pack_reference(grid.permute(2, 1, 0), 0.5))


def test_opcheck(device: torch.device) -> None:
    grid, cells = torch.rand(3, 3, 3, device=device), torch.tensor([1, 5, 5], device=device)
    torch.library.opcheck(_occupancy_update, (grid, cells, torch.rand(3, device=device), 0.9))
    torch.library.opcheck(_occupancy_update, (grid, None, torch.rand(27, device=device), 0.9))
    torch.library.opcheck(_occupancy_pack, (grid, torch.tensor(0.5, device=device)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grid": torch.zeros(2, 2, 3)}, ValueError, r"grid must have shape \[2, 2, 2\], got \[2, 2, 3\]"),
        ({"grid": torch.zeros(8)}, ValueError, r"grid must have shape \[R, R, R >= 1\], got \[8\]"),
        ({"grid": torch.zeros(0, 0, 0)}, ValueError, "grid must have"),
        ({"grid": torch.zeros(2, 2, 2).double()}, TypeError, "grid must be torch.float32"),
        ({"grid": torch.zeros(2, 2, 4)[..., ::2]}, ValueError, "grid must be contiguous"),
        ({"cells": torch.zeros(3)}, TypeError, "cells must be torch.int32 or torch.int64"),
        ({"cells": torch.tensor([0, 8, 1])}, IndexError, r"cells must be in \[0, 8\), got 0 to 8"),
        ({"cells": torch.tensor([0, -1, 1])}, IndexError, "got -1 to 1"),
        ({"cells": None}, ValueError, r"density must have shape \[8\], got \[3\]"),
        ({"density": torch.zeros(4)}, ValueError, "density has 4 rows, cells has 3"),
        ({"density": torch.zeros(3).double()}, TypeError, "density must be torch.float32"),
        ({"density": torch.zeros(3, device="meta")}, ValueError, "density is on meta"),
        ({"decay": 1.5}, ValueError, "decay must be between 0 and 1, got 1.5"),
    ],
)
def test_update_bad_input(change: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "grid": torch.zeros(2, 2, 2),
        "cells": torch.tensor([0, 1, 2]),
        "density": torch.zeros(3),
        "decay": 0.9,
    }
    with pytest.raises(error, match=message):
        occupancy_update(**{**arguments, **change})


def test_pack_bad_input() -> None:
    with pytest.raises(ValueError, match=r"threshold must have shape \[\]"):
        occupancy_pack(torch.zeros(2, 2, 2), torch.zeros(1))
    with pytest.raises(ValueError, match="threshold must be a number"):
        occupancy_pack(torch.zeros(2, 2, 2), float("nan"))
    with pytest.raises(ValueError, match="grid must have shape"):
        occupancy_pack(torch.zeros(2, 2), 0.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bitfield": None}, TypeError, "bitfield must be a torch.Tensor, got None"),
        ({"bitfield": torch.zeros(8)}, TypeError, "bitfield must be torch.uint8, got torch.float32"),
        ({"bitfield": torch.zeros(9, dtype=torch.uint8)}, ValueError, r"bitfield must have shape \[8\], got \[9\]"),
        ({"resolution": 4.0}, TypeError, r"resolution must be between 1 and 1290 \(an integer\), got 4.0"),
        ({"resolution": 10**5000}, ValueError, "resolution must be between 1 and 1290, got a number of 16610 bits"),
        ({"cascades": 0}, ValueError, "cascades must be between 1 and"),
        ({"resolution": 1290, "cascades": 2}, ValueError, "cascades must be of less than 2"),
    ],
)
def test_unpack_bad_input(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"bitfield": torch.zeros(8, dtype=torch.uint8), "resolution": 4, "cascades": 1}
    with pytest.raises(error, match=rf"^occupancy_unpack: {message}"):
        occupancy_unpack(**{**arguments, **change})


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    grid = torch.rand(16, 16, 16, device="cuda")
    cells, density = torch.randint(0, 4096, (999,), device="cuda"), torch.rand(999, device="cuda")
    threshold = grid.mean()
    occupancy_update(grid, cells, density, 0.9)
    torch.cuda.set_sync_debug_mode("error")
    try:
        occupancy_update(grid, cells, density, 0.9)
        occupancy_pack(grid, threshold)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cascades_are_one_grid_after_the_other(device: torch.device) -> None:
    grid = torch.rand(3, 6, 6, 6, device=device)
    bits = occupancy_pack(grid, 0.4)
    assert torch.equal(bits, occupancy_pack_reference(grid, 0.4))
    assert torch.equal(bits, torch.cat([occupancy_pack(part, 0.4) for part in grid]))
    assert torch.equal(occupancy_unpack(bits, 6, cascades=3), grid > 0.4)
    cells = torch.tensor([3, 6**3 + 3, 3 * 6**3 - 1], device=device)
    twin = grid.clone()
    occupancy_update(grid, cells, torch.full((3,), 2.0, device=device), 0.5)
    occupancy_update_reference(twin, cells, torch.full((3,), 2.0, device=device), 0.5)
    assert torch.equal(grid, twin)
    assert [float(grid[0, 0, 0, 3]), float(grid[1, 0, 0, 3]), float(grid[2, 5, 5, 5])] == [2.0, 2.0, 2.0]
    assert int((grid == 2.0).sum()) == 3
    with pytest.raises(ValueError, match=r"grid must have shape \[C, 6, 6, 6\], got \[3, 6, 6, 5\]"):
        occupancy_pack(grid[..., :5], 0.4)
