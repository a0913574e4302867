"""Hash grid: native core against the twin, its derivatives up to the second, and the layout of its table."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.ops import (
    hash_grid,
    hash_grid_layout,
    hash_grid_position_gradient,
    hash_grid_position_gradient_reference,
    hash_grid_reference,
)

CPU = torch.device("cpu")
# A dense level, one hashed into a power of two (a mask), one hashed into an odd number of rows (a division).
RESOLUTIONS = [2, 4, 7]
ROWS = [27, 64, 77]


def grid(device: torch.device = CPU, features: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Table, level offsets and resolutions."""
    table = torch.randn(sum(ROWS), features, dtype=torch.float64)
    offsets = torch.tensor([0, *ROWS]).cumsum(0)
    return table.to(device, dtype), offsets.to(device), torch.tensor(RESOLUTIONS, dtype=torch.int32, device=device)


def points(n: int, device: torch.device = CPU, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(n, 3, dtype=torch.float64).to(device, dtype)


def assert_near(actual: Tensor, expected: Tensor, roundings: float) -> None:
    """Within so many roundings of the dtype of `actual`, relative to the largest expected value (or 1)."""
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return
    scale = max(1.0, expected.abs().max().item())
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= roundings * torch.finfo(actual.dtype).eps * scale


@pytest.mark.parametrize("smoothstep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "features"), [(0, 2), (1, 4), (113, 1), (113, 8), (1023, 2), (1023, 4)])
def test_matches_the_twin(n: int, features: int, dtype: torch.dtype, smoothstep: bool, device: torch.device) -> None:
    """Values, both gradients, and the gradients of the gradient to the positions, against the twin in float64."""
    table, *levels = grid(device, features, dtype)
    positions = points(n, device, dtype)
    direction = torch.randn(n, 3, dtype=dtype, device=device)
    results = []
    for function, kind in ((hash_grid, dtype), (hash_grid_reference, torch.float64)):
        p, w = positions.detach().to(kind).requires_grad_(), table.detach().to(kind).requires_grad_()
        output = function(p, w, *levels, smoothstep)
        grad_output = torch.linspace(-1, 1, output.numel(), dtype=dtype, device=device).view_as(output).to(kind)
        grad_output.requires_grad_()
        first = torch.autograd.grad(output, (p, w), grad_output, create_graph=True)
        along = (first[0] * direction.to(kind)).sum()
        second = torch.autograd.grad(along, (grad_output, w, p), allow_unused=True, materialize_grads=True)
        results.append((output, *first, *second))
    # A position rounds to 7 cells, a row sums up to 300 terms, a second derivative carries a factor of 7^2.
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == dtype
        assert_near(actual, expected, roundings=128)


@pytest.mark.parametrize("smoothstep", [False, True])
@pytest.mark.parametrize("features", [1, 2])
def test_first_and_second_derivatives_are_those_of_finite_differences(features: int, smoothstep: bool) -> None:
    table, *levels = grid(features=features)
    arguments = (points(4).requires_grad_(), table.requires_grad_())

    def encode(positions: Tensor, table: Tensor) -> Tensor:
        return hash_grid(positions, table, *levels, smoothstep)

    assert torch.autograd.gradcheck(encode, arguments)
    assert torch.autograd.gradgradcheck(encode, arguments)


@pytest.mark.parametrize("smoothstep", [False, True])
def test_position_gradient(smoothstep: bool, device: torch.device) -> None:
    table, *levels = grid(device)
    positions, grad_output = points(113, device), torch.randn(113, 6, dtype=torch.float64, device=device)
    direction = torch.randn(113, 3, dtype=torch.float64, device=device)
    inputs = [x.requires_grad_() for x in (grad_output, positions, table)]
    actual = hash_grid_position_gradient(grad_output, positions, table, *levels, smoothstep)
    expected = hash_grid_position_gradient_reference(grad_output, positions, table, *levels, smoothstep)
    assert_near(actual, expected, roundings=64)
    for a, e in zip(
        torch.autograd.grad(actual, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        assert_near(a, e, roundings=256)


def test_gradients_of_some_inputs_only(device: torch.device) -> None:
    table, *levels = grid(device)
    positions, grad_output = points(9, device), torch.randn(9, 6, dtype=torch.float64, device=device)
    everything = [x.clone().requires_grad_() for x in (grad_output, positions, table)]
    direction = torch.randn(9, 3, dtype=torch.float64, device=device)
    wanted = torch.autograd.grad(hash_grid_position_gradient(*everything, *levels), everything, direction)
    for i in range(3):
        inputs = [grad_output, positions, table]
        inputs[i] = inputs[i].clone().requires_grad_()
        (actual,) = torch.autograd.grad(hash_grid_position_gradient(*inputs, *levels), inputs[i], direction)
        assert_near(actual, wanted[i], roundings=64)


def test_vertices_read_the_rows_they_should(device: torch.device) -> None:
    """The order of the rows is part of every checkpoint."""
    table = torch.arange(168, dtype=torch.float64, device=device).unsqueeze(1)
    _, *levels = grid(device)
    # Vertex (1, 2, 0) of the dense level, (3, 1, 2) of the masked and (6, 5, 7) of the divided one.
    positions = torch.tensor([[1 / 2, 2 / 2, 0], [3 / 4, 1 / 4, 2 / 4], [6 / 7, 5 / 7, 7 / 7]], dtype=torch.float64)
    output = hash_grid(positions.to(device), table, *levels)
    masked = 27 + ((3 ^ 2654435761 ^ (2 * 805459861 % 2**32)) & 63)
    divided = 27 + 64 + (6 ^ (5 * 2654435761 % 2**32) ^ (7 * 805459861 % 2**32)) % 77
    assert output[0, 0].item() == 1 + 3 * 2
    assert output[1, 1].item() == masked
    assert output[2, 2].item() == pytest.approx(divided, abs=1e-9)


def test_outside_is_clamped(device: torch.device) -> None:
    table, *levels = grid(device)
    outside = torch.tensor([[-0.5, 0.3, 0.6], [0.3, 1.25, 2.0], [math.inf, -math.inf, 0.5]], dtype=torch.float64)
    outside = outside.to(device).requires_grad_()
    output = hash_grid(outside, table, *levels)
    assert torch.equal(output, hash_grid(outside.detach().clamp(0, 1), table, *levels))
    (gradient,) = torch.autograd.grad(output.sum(), outside)
    inside = (outside >= 0) & (outside <= 1)
    assert torch.equal(gradient != 0, inside)


def test_corners_of_the_box(device: torch.device) -> None:
    table, *levels = grid(device)
    corners = torch.tensor([[0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.float64, device=device).requires_grad_()
    output, expected = (f(corners, table, *levels) for f in (hash_grid, hash_grid_reference))
    assert_near(output, expected, roundings=16)
    first, wanted = (torch.autograd.grad(x.sum(), corners)[0] for x in (output, expected))
    assert_near(first, wanted, roundings=64)


def test_nan_position_gives_nan_and_reads_nothing_else(device: torch.device) -> None:
    table, *levels = grid(device)
    positions = points(5, device)
    positions[2, 1] = math.nan
    for encode, gradient in (
        (hash_grid, hash_grid_position_gradient),
        (hash_grid_reference, hash_grid_position_gradient_reference),
    ):
        output = encode(positions, table, *levels)
        assert output.isnan().all(1).tolist() == [False, False, True, False, False]
        slopes = gradient(torch.ones_like(output), positions, table, *levels)
        assert slopes.isnan().tolist() == [[False] * 3, [False] * 3, [True, False, True], [False] * 3, [False] * 3]


def test_strided_and_misaligned_arguments(device: torch.device) -> None:
    table, *levels = grid(device, features=8, dtype=torch.float32)
    positions = points(113, device, torch.float32)
    expected = hash_grid(positions, table, *levels)
    buffer = torch.zeros(table.numel() + 1, device=device)
    buffer[1:] = table.flatten()
    misaligned = buffer[1:].view_as(table)  # contiguous, but no row starts where a vector load may
    strided = positions.t().contiguous().t()
    assert torch.equal(hash_grid(strided, misaligned, *levels), expected)
    assert torch.equal(hash_grid(positions, table.t().contiguous().t(), *levels), expected)
    table.requires_grad_()
    (from_scalar,) = torch.autograd.grad(hash_grid(positions, table, *levels).sum(), table)  # an expanded gradient
    (full,) = torch.autograd.grad(hash_grid(positions, table, *levels), table, torch.ones_like(expected))
    assert_near(from_scalar, full, roundings=64)


def test_same_bits_for_any_number_of_threads() -> None:
    """A seed gives one mesh, whatever the machine is busy with. Seven threads share three levels."""
    table, *levels = grid(dtype=torch.float32)
    positions, direction = points(5003, dtype=torch.float32), torch.randn(5003, 3)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 7):
            torch.set_num_threads(n)
            p, w = positions.clone().requires_grad_(), table.clone().requires_grad_()
            output = hash_grid(p, w, *levels, True)
            first = torch.autograd.grad(output.square().sum(), (p, w), create_graph=True)
            results.append((output, *first, *torch.autograd.grad((first[0] * direction).sum(), (w, p))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, e) for a, e in zip(other, results[0], strict=True))


@pytest.mark.parametrize("smoothstep", [False, True])
def test_opcheck(smoothstep: bool, device: torch.device) -> None:
    table, *levels = grid(device)
    positions, grad_output = points(5, device).requires_grad_(), torch.randn(5, 6, dtype=torch.float64, device=device)
    grad_output.requires_grad_()
    table.requires_grad_()
    ops = torch.ops.dreamfusion_fast
    rest = (*levels, smoothstep, None)
    torch.library.opcheck(ops.hash_grid.default, (positions, table, *rest))
    torch.library.opcheck(ops.hash_grid_backward_table.default, (grad_output, positions, table.shape[0], *rest))
    torch.library.opcheck(ops.hash_grid_backward_positions.default, (grad_output, positions, table, *rest))
    tensors = [x.detach() for x in (positions, grad_output, positions, table)]
    torch.library.opcheck(ops.hash_grid_backward_backward.default, (*tensors, *rest, [True, False, True]))


@pytest.mark.gpu
def test_level_outside_the_table_is_nan_on_the_gpu() -> None:
    table, offsets, resolutions = grid(torch.device("cuda"), dtype=torch.float32)
    positions = points(113, torch.device("cuda"), torch.float32)
    output = hash_grid(positions, table[:-1], offsets, resolutions)
    assert output[:, 4:].isnan().all()
    assert torch.equal(output[:, :4], hash_grid(positions, table, offsets, resolutions)[:, :4])


def test_layout() -> None:
    offsets, resolutions = hash_grid_layout(16, 16, 2048, 19)
    assert resolutions.tolist() == [16, 22, 30, 42, 58, 80, 111, 153, 212, 294, 406, 561, 776, 1072, 1482, 2048]
    assert (offsets.dtype, resolutions.dtype) == (torch.int64, torch.int32)
    assert offsets[:3].tolist() == [0, 4920, 4920 + 12168]  # 17^3 = 4913 and 23^3 = 12167, rounded up to 8
    assert set(offsets.diff()[6:].tolist()) == {2**19}
    assert [x.tolist() for x in hash_grid_layout(1, 3, 3, 12)] == [[0, 64], [3]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 16, 32, 15), "levels must be at least 1 and at most 1024, got 0"),
        ((2, 0, 32, 15), "base_resolution must be at least 1 and at most finest_resolution, 32, got 0"),
        ((2, 33, 32, 15), "base_resolution must be at least 1 and at most finest_resolution, 32, got 33"),
        ((2, 16, 32, 2), "log2_rows must be between 3 and 30, got 2"),
    ],
)
def test_impossible_layout(arguments: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hash_grid_layout(*arguments)


def wrong_arguments() -> list[tuple[dict[str, object], type[Exception], str]]:
    offsets = torch.tensor([0, *ROWS]).cumsum(0)
    return [
        ({"positions": points(4)[:, :2]}, ValueError, r"positions must have shape \[n_samples, 3\], got \[4, 2\]"),
        ({"positions": points(4).half()}, TypeError, "positions must be torch.float32"),
        ({"positions": points(4).float()}, TypeError, "table must be torch.float32, got torch.float64"),
        ({"table": torch.rand(168, 3).double()}, ValueError, "table must have 1, 2, 4 or 8 columns"),
        (
            {"table": torch.rand(167, 2).double()},
            ValueError,
            "level_offsets must rise from 0 to the rows of the table, 167",
        ),
        ({"level_offsets": offsets.int()}, TypeError, "level_offsets must be torch.int64"),
        ({"level_offsets": offsets[:3]}, ValueError, r"level_offsets must have shape \[4\], got \[3\]"),
        ({"level_offsets": torch.tensor([0, 91, 27, 168])}, ValueError, "level_offsets must rise"),
        ({"resolutions": torch.tensor(RESOLUTIONS)}, TypeError, "resolutions must be torch.int32"),
        (
            {"resolutions": torch.tensor([0, 4, 7], dtype=torch.int32)},
            ValueError,
            r"resolutions must lie in \[1, 2\^24\]",
        ),
    ]


@pytest.mark.parametrize(
    ("change", "error", "message"), wrong_arguments(), ids=lambda x: x if isinstance(x, str) else ""
)
def test_wrong_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    table, offsets, resolutions = grid()
    arguments = {"positions": points(4), "table": table, "level_offsets": offsets, "resolutions": resolutions}
    with pytest.raises(error, match=message):
        hash_grid(**{**arguments, **change})  # type: ignore[arg-type]


def test_wrong_grad_output() -> None:
    table, *levels = grid()
    with pytest.raises(ValueError, match=r"grad_output must have shape \[4, 6\], got \[4, 5\]"):
        hash_grid_position_gradient(torch.rand(4, 5).double(), points(4), table, *levels)
