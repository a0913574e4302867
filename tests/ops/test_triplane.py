"""Triplane: native core against the twin, its derivatives up to the second, and scenes of a batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.ops import (
    triplane,
    triplane_position_gradient,
    triplane_position_gradient_reference,
    triplane_reference,
)

CPU = torch.device("cpu")
HEIGHT, WIDTH, SCENES = 6, 9, 2
both_degrees = pytest.mark.parametrize("degree", [1, 2])


def make_planes(device: torch.device = CPU, features: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(SCENES, 3, HEIGHT, WIDTH, features, dtype=torch.float64).to(device, dtype)


def points(n: int, device: torch.device = CPU, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(n, 3, dtype=torch.float64).to(device, dtype)


def of_scenes(n: int, device: torch.device = CPU) -> Tensor:
    return torch.randint(0, SCENES, (n,), dtype=torch.int32).to(device)


def assert_near(actual: Tensor, expected: Tensor, roundings: float) -> None:
    """Within so many roundings of the dtype of `actual`, relative to the largest expected value (or 1)."""
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return
    scale = max(1.0, expected.abs().max().item())
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= roundings * torch.finfo(actual.dtype).eps * scale


@both_degrees
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n", "features"), [(0, 4), (1, 8), (113, 1), (113, 13), (113, 24), (1023, 3), (1023, 4), (1023, 8)]
)
def test_matches_the_twin(n: int, features: int, dtype: torch.dtype, degree: int, device: torch.device) -> None:
    """Values, both gradients, and the gradients of the gradient to the positions, against the twin in float64."""
    planes, positions, scenes = make_planes(device, features, dtype), points(n, device, dtype), of_scenes(n, device)
    direction = torch.randn(n, 3, dtype=dtype, device=device)
    results = []
    for function, kind in ((triplane, dtype), (triplane_reference, torch.float64)):
        p, w = positions.detach().to(kind).requires_grad_(), planes.detach().to(kind).requires_grad_()
        output = function(p, w, scenes, degree)
        grad_output = torch.linspace(-1, 1, output.numel(), dtype=dtype, device=device).view_as(output).to(kind)
        grad_output.requires_grad_()
        first = torch.autograd.grad(output, (p, w), grad_output, create_graph=True)
        along = (first[0] * direction.to(kind)).sum()
        second = torch.autograd.grad(along, (grad_output, w, p), allow_unused=True, materialize_grads=True)
        results.append((output, *first, *second))
    # A position rounds to 8 cells, a vertex sums up to 300 terms, a second derivative carries a factor of 8^2.
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == dtype
        assert_near(actual, expected, roundings=128)


@pytest.mark.quick(1)
@both_degrees
def test_first_and_second_derivatives_are_those_of_finite_differences(degree: int) -> None:
    arguments = (points(4).requires_grad_(), make_planes(features=2).requires_grad_())
    scenes = torch.tensor([0, 1, 1, 0])

    def encode(positions: Tensor, planes: Tensor) -> Tensor:
        return triplane(positions, planes, scenes, degree)

    assert torch.autograd.gradcheck(encode, arguments)
    assert torch.autograd.gradgradcheck(encode, arguments)


@both_degrees
def test_position_gradient(degree: int, device: torch.device) -> None:
    planes, positions, scenes = make_planes(device), points(113, device), of_scenes(113, device)
    grad_output = torch.randn(113, 12, dtype=torch.float64, device=device)
    direction = torch.randn(113, 3, dtype=torch.float64, device=device)
    inputs = [x.requires_grad_() for x in (grad_output, positions, planes)]
    actual = triplane_position_gradient(*inputs, scenes, degree)
    expected = triplane_position_gradient_reference(*inputs, scenes, degree)
    assert_near(actual, expected, roundings=64)
    for a, e in zip(
        torch.autograd.grad(actual, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        assert_near(a, e, roundings=256)


def test_gradients_of_some_inputs_only(device: torch.device) -> None:
    planes, positions = make_planes(device), points(9, device)
    grad_output = torch.randn(9, 12, dtype=torch.float64, device=device)
    everything = [x.clone().requires_grad_() for x in (grad_output, positions, planes)]
    direction = torch.randn(9, 3, dtype=torch.float64, device=device)
    wanted = torch.autograd.grad(triplane_position_gradient(*everything), everything, direction)
    for i in range(3):
        inputs = [grad_output, positions, planes]
        inputs[i] = inputs[i].clone().requires_grad_()
        (actual,) = torch.autograd.grad(triplane_position_gradient(*inputs), inputs[i], direction)
        assert_near(actual, wanted[i], roundings=64)


def test_vertices_are_where_they_should_be(device: torch.device) -> None:
    """The order of the axes is part of every checkpoint: (x, y), (x, z) and (y, z), the first along the rows."""
    planes = torch.arange(3 * HEIGHT * WIDTH, dtype=torch.float64, device=device).view(1, 3, HEIGHT, WIDTH, 1)
    position = torch.tensor([[3 / (WIDTH - 1), 2 / (HEIGHT - 1), 4 / (HEIGHT - 1)]], dtype=torch.float64)
    across = 2 / (HEIGHT - 1) * (WIDTH - 1)  # of y, which is along the rows of the third plane
    output = triplane(position.to(device), planes)[0].tolist()
    expected = [2 * WIDTH + 3, (HEIGHT + 4) * WIDTH + 3, (2 * HEIGHT + 4) * WIDTH + across]
    assert output == pytest.approx(expected, abs=1e-9)


def test_degree_2_is_smooth_and_sums_to_one(device: torch.device) -> None:
    """On both sides of a border between cells, value and slope agree; of degree 1 the slope jumps."""
    planes, ones = make_planes(device), torch.ones(1, 3, HEIGHT, WIDTH, 1, dtype=torch.float64, device=device)
    border = torch.tensor([[4 / (WIDTH - 2), 0.4, 0.7]], dtype=torch.float64, device=device)
    sides = torch.cat([border - 1e-9, border + 1e-9]).requires_grad_()
    output = triplane(sides, planes, None, 2)
    assert_near(output[0], output[1], roundings=1e9)
    (slopes,) = torch.autograd.grad(output.sum(), sides)
    assert (slopes[0] - slopes[1]).abs().max() < 1e-5
    assert_near(triplane(points(113, device), ones, None, 2), ones.new_ones(113, 3), roundings=4)
    border[0, 0] = 4 / (WIDTH - 1)
    sides = torch.cat([border - 1e-9, border + 1e-9]).requires_grad_()
    (slopes,) = torch.autograd.grad(triplane(sides, planes).sum(), sides)
    assert (slopes[0, 0] - slopes[1, 0]).abs() > 0.1


@both_degrees
def test_smallest_planes(degree: int, device: torch.device) -> None:
    planes = torch.randn(1, 3, degree + 1, degree + 1, 5, dtype=torch.float64, device=device)
    positions = points(113, device)
    actual = triplane(positions, planes, None, degree)
    assert_near(actual, triplane_reference(positions, planes, None, degree), roundings=16)


@both_degrees
def test_scenes_do_not_mix(degree: int, device: torch.device) -> None:
    planes, positions, scenes = make_planes(device).requires_grad_(), points(113, device), of_scenes(113, device)
    output = triplane(positions, planes, scenes, degree)
    (together,) = torch.autograd.grad(output.square().sum(), planes)
    for scene in range(SCENES):
        mine = scenes == scene
        alone = planes[scene : scene + 1].detach().requires_grad_()
        expected = triplane(positions[mine], alone, None, degree)
        assert torch.equal(output[mine], expected)
        (grad,) = torch.autograd.grad(expected.square().sum(), alone)
        assert_near(together[scene], grad[0], roundings=64)
    assert torch.equal(output, triplane(positions, planes, scenes.long(), degree))


@both_degrees
def test_outside_is_clamped(degree: int, device: torch.device) -> None:
    planes = make_planes(device)
    outside = torch.tensor([[-0.5, 0.3, 0.6], [0.3, 1.25, 2.0], [math.inf, -math.inf, 0.5]], dtype=torch.float64)
    outside = outside.to(device).requires_grad_()
    output = triplane(outside, planes, None, degree)
    assert torch.equal(output, triplane(outside.detach().clamp(0, 1), planes, None, degree))
    (gradient,) = torch.autograd.grad(output.sum(), outside)
    inside = (outside >= 0) & (outside <= 1)
    assert torch.equal(gradient != 0, inside)


@both_degrees
def test_corners_of_the_box(degree: int, device: torch.device) -> None:
    planes = make_planes(device)
    corners = torch.tensor([[0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.float64, device=device).requires_grad_()
    output, expected = (f(corners, planes, None, degree) for f in (triplane, triplane_reference))
    assert_near(output, expected, roundings=16)
    first, wanted = (torch.autograd.grad(x.sum(), corners)[0] for x in (output, expected))
    assert_near(first, wanted, roundings=64)


@both_degrees
def test_nan_position_gives_nan_in_its_planes_and_reads_nothing_else(degree: int, device: torch.device) -> None:
    planes, positions = make_planes(device, features=1), points(3, device)
    positions[1, 1] = math.nan  # of which (x, z) knows nothing
    for encode, gradient in (
        (triplane, triplane_position_gradient),
        (triplane_reference, triplane_position_gradient_reference),
    ):
        output = encode(positions, planes, None, degree)
        assert output.isnan().tolist() == [[False] * 3, [True, False, True], [False] * 3]
        slopes = gradient(torch.ones_like(output), positions, planes, None, degree)
        assert slopes.isnan().tolist() == [[False] * 3, [True, degree == 2, True], [False] * 3]


def test_strided_and_misaligned_arguments(device: torch.device) -> None:
    planes, positions = make_planes(device, 8, torch.float32), points(113, device, torch.float32)
    scenes = of_scenes(113, device)
    expected = triplane(positions, planes, scenes)
    buffer = torch.zeros(planes.numel() + 1, device=device)
    buffer[1:] = planes.flatten()
    misaligned = buffer[1:].view_as(planes)  # contiguous, but no vertex starts where a vector load may
    strided = positions.t().contiguous().t()
    assert torch.equal(triplane(strided, misaligned, torch.stack([scenes, scenes], 1)[:, 0]), expected)
    channels_first = planes.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    assert torch.equal(triplane(positions, channels_first, scenes), expected)
    planes.requires_grad_()
    (from_scalar,) = torch.autograd.grad(triplane(positions, planes, scenes).sum(), planes)  # an expanded gradient
    (full,) = torch.autograd.grad(triplane(positions, planes, scenes), planes, torch.ones_like(expected))
    assert_near(from_scalar, full, roundings=64)


@both_degrees
def test_same_bits_for_any_number_of_threads(degree: int) -> None:
    """A seed gives one mesh, whatever the machine is busy with. Seven threads share six rows."""
    planes, scenes = make_planes(dtype=torch.float32), of_scenes(5003)
    positions, direction = points(5003, dtype=torch.float32), torch.randn(5003, 3)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 7):
            torch.set_num_threads(n)
            p, w = positions.clone().requires_grad_(), planes.clone().requires_grad_()
            output = triplane(p, w, scenes, degree)
            first = torch.autograd.grad(output.square().sum(), (p, w), create_graph=True)
            results.append((output, *first, *torch.autograd.grad((first[0] * direction).sum(), (w, p))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, e) for a, e in zip(other, results[0], strict=True))


@pytest.mark.parametrize("with_scenes", [False, True])
@both_degrees
def test_opcheck(degree: int, with_scenes: bool, device: torch.device) -> None:
    planes, positions = make_planes(device).requires_grad_(), points(5, device).requires_grad_()
    grad_output = torch.randn(5, 12, dtype=torch.float64, device=device).requires_grad_()
    rest = (of_scenes(5, device) if with_scenes else None, degree)
    ops = torch.ops.dreamfusion_fast
    torch.library.opcheck(ops.triplane.default, (positions, planes, *rest))
    torch.library.opcheck(ops.triplane_backward_planes.default, (grad_output, positions, list(planes.shape), *rest))
    torch.library.opcheck(ops.triplane_backward_positions.default, (grad_output, positions, planes, *rest))
    tensors = [x.detach() for x in (positions, grad_output, positions, planes)]
    torch.library.opcheck(ops.triplane_backward_backward.default, (*tensors, *rest, [True, False, True]))


@pytest.mark.gpu
@pytest.mark.parametrize("scene", [-1, SCENES, 2**31 - 1, -(2**31)])
def test_a_scene_that_there_is_not_is_nan_on_the_gpu(scene: int) -> None:
    device = torch.device("cuda")
    planes, positions = make_planes(device, dtype=torch.float32), points(113, device, torch.float32)
    scenes = of_scenes(113, device)
    expected = triplane(positions, planes, scenes)
    scenes[7] = scene
    output = triplane(positions, planes, scenes)
    assert output[7].isnan().all()
    assert torch.equal(output[8:], expected[8:])
    wide = scenes.long()
    wide[7] = 2**32  # would be scene 0 in 32 bits
    assert triplane(positions, planes, wide)[7].isnan().all()


def wrong_arguments() -> list[tuple[dict[str, object], type[Exception], str]]:
    wanted = r"planes must have at least one scene, 2 to 2\^14 vertices a side and 1 to 2\^12 features, got "
    return [
        ({"positions": points(4)[:, :2]}, ValueError, r"positions must have shape \[n_samples, 3\], got \[4, 2\]"),
        ({"positions": points(4).half()}, TypeError, "positions must be torch.float32"),
        ({"positions": points(4).float()}, TypeError, "planes must be torch.float32, got torch.float64"),
        ({"planes": make_planes()[:, :2]}, ValueError, r"planes must have shape \[n_scenes, 3, height, width, n_fea"),
        ({"planes": make_planes()[..., :0]}, ValueError, wanted + r"\[2, 3, 6, 9, 0\]"),
        ({"planes": make_planes()[:, :, :1]}, ValueError, wanted + r"\[2, 3, 1, 9, 4\]"),
        ({"planes": make_planes()[:0]}, ValueError, wanted + r"\[0, 3, 6, 9, 4\]"),
        ({"planes": make_planes()[:, :, :2], "degree": 2}, ValueError, r"planes must .* 3 to 2\^14 vertices"),
        ({"scenes": torch.zeros(4)}, TypeError, "scenes must be torch.int32 or torch.int64, got torch.float32"),
        ({"scenes": torch.zeros(3, dtype=torch.int32)}, ValueError, r"scenes must have shape \[4\], got \[3\]"),
        ({"scenes": torch.tensor([0, 1, 2, 0])}, ValueError, r"scenes must lie in \[0, 1\], got 2"),
        ({"scenes": torch.tensor([0, 1, -1, 0])}, ValueError, r"scenes must lie in \[0, 1\], got -1"),
        ({"scenes": torch.tensor([0, 1, 2**32, 0])}, ValueError, r"scenes must lie in \[0, 1\], got 4294967296"),
        ({"degree": 3}, ValueError, "degree must be 1 or 2, got 3"),
        ({"degree": 1.0}, TypeError, r"degree must be 1 or 2 \(an integer\), got 1.0"),
        ({"degree": True}, TypeError, "degree must be 1 or 2"),
    ]


@pytest.mark.parametrize(
    ("change", "error", "message"), wrong_arguments(), ids=lambda x: x if isinstance(x, str) else ""
)
def test_wrong_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"positions": points(4), "planes": make_planes(), "scenes": None, "degree": 1}
    with pytest.raises(error, match=f"^triplane: {message}"):
        triplane(**{**arguments, **change})  # type: ignore[arg-type]


def test_wrong_grad_output() -> None:
    with pytest.raises(ValueError, match=r"grad_output must have shape \[4, 12\], got \[4, 5\]"):
        triplane_position_gradient(torch.rand(4, 5).double(), points(4), make_planes())
