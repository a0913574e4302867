"""Hash grids that lie as those of other libraries: against emulators of them, and the derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from other_grids import grid_encoder, level_scale, tiny_cuda_nn
from torch import Tensor

from dreamfusion_fast.ops import (
    hash_grid,
    hash_grid_layout,
    hash_grid_position_gradient,
    hash_grid_position_gradient_reference,
    hash_grid_reference,
)
from dreamfusion_fast.ops.hash_grid_placement import hash_grid_placements
from dreamfusion_fast.ops.tiles.hash_grid import (
    HashGridTileLayout,
    directional_derivative,
    directional_derivative_reference,
    encode,
    encode_reference,
    position_gradient,
    position_gradient_reference,
    scatter,
    scatter_reference,
)

CPU = torch.device("cpu")
GROWTH, BASE, LEVELS = 1.7, 3, 4  # 3, 5.1, 8.67 and 14.7 cells
ROWS = [[32, 136, 64, 200], [16, 40, 64, 77]]  # by whether two-dimensional: dense, dense, a mask, a division


@dataclass
class Grid:
    """A library's grid: its emulator, and what `hash_grid` is given for it."""

    emulator: Callable[..., np.ndarray]
    placements: Tensor
    dims: int

    def arguments(self, device: torch.device, features: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Table, level offsets, resolutions."""
        rows = ROWS[self.dims == 2]
        table = torch.randn(sum(rows), features, dtype=torch.float64)
        offsets = torch.tensor([0, *rows]).cumsum(0)
        resolutions = torch.full((LEVELS,), 8, dtype=torch.int32)
        return table.to(device, dtype), offsets.to(device), resolutions.to(device)

    def expected(self, positions: Tensor, table: Tensor, offsets: Tensor) -> Tensor:
        points, rows = (x.detach().double().cpu().numpy() for x in (positions, table))
        return torch.from_numpy(self.emulator(points, rows, offsets.tolist(), GROWTH, BASE)).to(positions.device)


def scales(single: bool = False) -> list[float]:
    return [float(level_scale(level, GROWTH, BASE, single)) for level in range(LEVELS)]


def clamped(dims: int, gridtype: str, align_corners: bool, interpolation: str) -> Grid:
    sides = [math.ceil(scale) for scale in scales()]
    ends, hashes = [side - 1 for side in sides], gridtype == "hash"
    if align_corners:
        placements = hash_grid_placements(ends, sides, 0, ends, hashes, dims)
    else:
        placements = hash_grid_placements(sides, sides, -0.5, ends, hashes, dims)
    options = {"gridtype": gridtype, "align_corners": align_corners, "interpolation": interpolation}
    return Grid(partial(grid_encoder, **options), placements, dims)


def offset(dims: int, gridtype: str, align_corners: bool, interpolation: str) -> Grid:
    less = [float(np.float32(scale) - np.float32(1)) for scale in scales()]
    sides = [math.ceil(scale) + (1 if align_corners else 2) for scale in less]
    placements = hash_grid_placements(less, sides, 0 if align_corners else 0.5, None, gridtype == "hash", dims)
    options = {"gridtype": gridtype, "align_corners": align_corners, "interpolation": interpolation}
    return Grid(partial(grid_encoder, flavour="torch-ngp", **options), placements, dims)


def unbounded(dims: int, gridtype: str, _: bool, interpolation: str) -> Grid:
    less = [float(np.float32(scale) - np.float32(1)) for scale in scales(single=True)]
    sides = [math.ceil(scale) + 1 for scale in less]
    emulator = partial(tiny_cuda_nn, hashed=gridtype == "hash", smooth=interpolation == "smoothstep")
    return Grid(emulator, hash_grid_placements(less, sides, 0.5, None, gridtype == "hash", dims), dims)


LIBRARIES = [(clamped, False), (clamped, True), (offset, False), (offset, True), (unbounded, False)]


def grids() -> list[object]:
    found = []
    for make, align in LIBRARIES:
        for dims in (2, 3):
            for gridtype in ("hash", "tiled"):
                for interpolation in ("linear", "smoothstep"):
                    name = f"{make.__name__}-{'corners-' if align else ''}{dims}d-{gridtype}-{interpolation}"
                    found.append(pytest.param((make, dims, gridtype, align, interpolation), id=name))
    return found


every_grid = pytest.mark.parametrize("made", grids())
some_grids = pytest.mark.parametrize("made", grids()[::3])


def grid_of(made: tuple[Callable[..., Grid], int, str, bool, str]) -> tuple[Grid, bool]:
    make, *rest = made
    return make(*rest), rest[-1] == "smoothstep"


@every_grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_grid_of_the_library(made: object, dtype: torch.dtype, device: torch.device) -> None:
    grid, smooth = grid_of(made)  # type: ignore[arg-type]
    table, *levels = grid.arguments(device, 2, dtype)
    corners = [[0.0] * grid.dims, [1.0] * grid.dims, [0.0, 1.0, 0.5][: grid.dims], [0.02, 0.98, 1.0][: grid.dims]]
    inside = torch.cat([torch.rand(59, grid.dims, dtype=torch.float64), torch.tensor(corners, dtype=torch.float64)])
    positions = inside.to(device, dtype)
    placements = grid.placements.to(device)
    expected = grid.expected(positions, table, levels[0])
    # A position rounds to 15 cells, and a weight with it; values are up to 4.
    tolerance = 1e-12 if dtype == torch.float64 else 5e-5
    for function in (hash_grid, hash_grid_reference):
        actual = function(positions, table, *levels, smooth, placements)
        assert actual.dtype == dtype
        assert (actual.double() - expected).abs().max().item() < tolerance


@pytest.mark.parametrize("gridtype", ["hash", "tiled"])
def test_without_an_end_the_grid_goes_on(gridtype: str, device: torch.device) -> None:
    grid = unbounded(3, gridtype, False, "linear")
    table, *levels = grid.arguments(device, 2, torch.float64)
    positions = (torch.rand(113, 3, dtype=torch.float64) * 20 - 10).to(device)
    placements = grid.placements.to(device)
    expected = grid.expected(positions, table, levels[0])
    for function in (hash_grid, hash_grid_reference):
        assert (function(positions, table, *levels, False, placements) - expected).abs().max().item() < 1e-11


@some_grids
@pytest.mark.parametrize("features", [1, 2, 4, 8])
@pytest.mark.parametrize("n", [0, 1, 1023])
def test_matches_the_twin(made: object, n: int, features: int, device: torch.device) -> None:
    """Values, both gradients, and the gradients of the gradient to the positions."""
    grid, smooth = grid_of(made)  # type: ignore[arg-type]
    table, *levels = grid.arguments(device, features, torch.float64)
    positions = torch.rand(n, 2 * grid.dims, dtype=torch.float64, device=device)[:, ::2] * 1.1 - 0.05
    direction = torch.randn(n, grid.dims, dtype=torch.float64, device=device)
    placements = grid.placements.to(device)
    results = []
    for function in (hash_grid, hash_grid_reference):
        p, w = positions.detach().requires_grad_(), table.detach().requires_grad_()
        output = function(p, w, *levels, smooth, placements)
        grad_output = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=device).view_as(output)
        grad_output.requires_grad_()
        first = torch.autograd.grad(output, (p, w), grad_output, create_graph=True)
        along = (first[0] * direction).sum()
        second = torch.autograd.grad(along, (grad_output, w, p), allow_unused=True, materialize_grads=True)
        results.append((output, *first, *second))
    for actual, expected in zip(*results, strict=True):
        scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * scale)


@pytest.mark.quick(4)
@some_grids
def test_derivatives_are_those_of_finite_differences(made: object) -> None:
    grid, smooth = grid_of(made)  # type: ignore[arg-type]
    table, *levels = grid.arguments(CPU, 1, torch.float64)
    arguments = (torch.rand(3, grid.dims, dtype=torch.float64).requires_grad_(), table.requires_grad_())

    def encoded(positions: Tensor, table: Tensor) -> Tensor:
        return hash_grid(positions, table, *levels, smooth, grid.placements)

    assert torch.autograd.gradcheck(encoded, arguments)
    assert torch.autograd.gradgradcheck(encoded, arguments)


@pytest.mark.parametrize("dims", [2, 3])
def test_position_gradient(dims: int, device: torch.device) -> None:
    grid = clamped(dims, "hash", False, "smoothstep")
    table, *levels = grid.arguments(device, 2, torch.float64)
    positions = torch.rand(113, dims, dtype=torch.float64, device=device).requires_grad_()
    grad_output = torch.randn(113, 2 * LEVELS, dtype=torch.float64, device=device)
    arguments = (grad_output, positions, table, *levels, True, grid.placements.to(device))
    actual = hash_grid_position_gradient(*arguments)
    expected = hash_grid_position_gradient_reference(*arguments)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(positions)
    for a, e in zip(*(torch.autograd.grad(x, positions, direction) for x in (actual, expected)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


def test_our_own_placement_said_with_numbers(device: torch.device) -> None:
    """The levels of `hash_grid_layout`, once without placements and once with what they amount to."""
    offsets, resolutions = (x.to(device) for x in hash_grid_layout(4, 3, 16, 9))
    table = torch.randn(int(offsets[-1]), 2, dtype=torch.float64, device=device)
    positions = torch.rand(113, 3, dtype=torch.float64, device=device) * 1.4 - 0.2
    ends = resolutions.tolist()
    placements = hash_grid_placements(ends, [end + 1 for end in ends], 0, ends).to(device)
    plain = hash_grid(positions, table, offsets, resolutions)
    assert torch.equal(hash_grid(positions, table, offsets, resolutions, False, placements), plain)


@some_grids
def test_tiles(made: object, device: torch.device) -> None:
    """The kernels over tiles take placements, too."""
    grid, smooth = grid_of(made)  # type: ignore[arg-type]
    table, *levels = grid.arguments(device, 2, torch.float32)
    layout = HashGridTileLayout(*levels, smooth, grid.placements.to(device))
    positions, direction = torch.rand(113, 3, device=device), torch.randn(113, 3, device=device)
    grads, values = torch.randn(2, 113, 2 * LEVELS, device=device).unbind(0)
    results: list[list[Tensor]] = []
    for dtype, functions in (
        (torch.float32, (encode, position_gradient, directional_derivative, scatter)),
        (
            torch.float64,
            (encode_reference, position_gradient_reference, directional_derivative_reference, scatter_reference),
        ),
    ):
        p, d, g, v, w = (x.to(dtype) for x in (positions, direction, grads, values, table))
        features, gradient, derivative = torch.empty_like(g), torch.empty_like(p), torch.empty_like(g)
        grad_table = torch.zeros_like(w)
        functions[0](p, w, layout, features)
        functions[1](g, p, w, layout, gradient)
        functions[2](d, p, w, layout, derivative)
        functions[3](grad_table, p, layout, g, None, d, v)
        results.append([features, gradient, derivative, grad_table])
    for actual, expected in zip(*results, strict=True):
        scale = max(1.0, expected.abs().max().item())
        assert (actual.double() - expected).abs().max().item() <= 256 * torch.finfo(torch.float32).eps * scale
    if grid.dims == 2:
        assert not results[0][1][:, 2].any()


def test_nan_position_gives_nan(device: torch.device) -> None:
    grid = unbounded(3, "hash", False, "linear")
    table, *levels = grid.arguments(device, 2, torch.float64)
    positions = torch.rand(5, 3, dtype=torch.float64, device=device)
    positions[2, 1] = math.nan
    for function in (hash_grid, hash_grid_reference):
        output = function(positions, table, *levels, False, grid.placements.to(device))
        assert output.isnan().all(1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("dims", [2, 3])
def test_opcheck(dims: int, device: torch.device) -> None:
    grid = clamped(dims, "hash", False, "linear")
    table, *levels = grid.arguments(device, 2, torch.float64)
    rest = (*levels, True, grid.placements.to(device))
    positions = torch.rand(5, 3, dtype=torch.float64, device=device).requires_grad_()
    grad_output = torch.randn(5, 2 * LEVELS, dtype=torch.float64, device=device).requires_grad_()
    table.requires_grad_()
    ops = torch.ops.dreamfusion_fast
    torch.library.opcheck(ops.hash_grid.default, (positions, table, *rest))
    torch.library.opcheck(ops.hash_grid_backward_table.default, (grad_output, positions, table.shape[0], *rest))
    torch.library.opcheck(ops.hash_grid_backward_positions.default, (grad_output, positions, table, *rest))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3.0, [4]), TypeError, "scales must be a list of numbers, got 3.0"),
        (([3.0], [4, 5]), ValueError, "sides must be as many as scales, 1, got 2"),
        (([-1.0], [4]), ValueError, r"scales\[0\] must be at least 0 and at most 2\^24, got -1.0"),
        (([3.0], [0]), ValueError, r"sides\[0\] must be at least 1 and at most 2\^24, got 0"),
        (([3.0], [4], 0.0, [2.5]), TypeError, r"highest\[0\] must be at least 0 and at most 2\^24 \(an integer\)"),
        (([3.0], [4], 2.0), ValueError, "shift must be between -1 and 1, got 2.0"),
        (([3.0], [4], 0.0, None, True, 8), ValueError, "dims must be between 2 and 7, got 8"),
    ],
)
def test_impossible_placements(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hash_grid_placements(*arguments)  # type: ignore[arg-type]


def test_wrong_arguments() -> None:
    grid = clamped(2, "hash", False, "linear")
    table, *levels = grid.arguments(CPU, 2, torch.float64)
    positions = torch.rand(5, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"positions must have shape \[n_samples, 3\], got \[5, 2\]"):
        hash_grid(positions, table, *levels)
    with pytest.raises(ValueError, match=r"placements must have shape \[4, 8\], got \[3, 8\]"):
        hash_grid(positions, table, *levels, False, grid.placements[:3])
    with pytest.raises(TypeError, match=r"placements must be torch.float32, got torch.float64"):
        hash_grid(positions, table, *levels, False, grid.placements.double())
    with pytest.raises(ValueError, match="placements must be those of hash_grid_placements"):
        hash_grid(positions, table, *levels, False, grid.placements * math.nan)
