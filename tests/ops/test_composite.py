"""Compositing: native core against the twin, and both against what is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.ops import composite, composite_reference

STEP = 0.03


def scene(counts: list[int], channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Random density, values, t and offsets for rays with these numbers of samples."""
    m = sum(counts)
    density = torch.rand(m, dtype=torch.float64) ** 4 * 30
    values = torch.randn(m, channels, dtype=torch.float64)
    t = 1 + torch.rand(m, dtype=torch.float64)
    offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    return *(x.to(device, dtype) for x in (density, values, t)), offsets.to(device)


def steps(kind: str, t: Tensor) -> float | Tensor:
    """One length for all samples, or a random one for each."""
    return STEP if kind == "one step" else (0.001 + 0.06 * torch.rand_like(t, dtype=torch.float64)).to(t.dtype)


KINDS = ["one step", "lengths"]


def assert_near(actual: Tensor, expected: Tensor, roundings: float) -> None:
    """Within so many roundings of the dtype of `actual`, relative to the largest expected value (or 1)."""
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return
    scale = max(1.0, expected.abs().max().item())
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= roundings * torch.finfo(actual.dtype).eps * scale


COUNTS = [[], [0], [1], [0, 0, 5, 0, 1, 31, 32, 33, 0], [1023, 0, 113], [2] * 113]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_matches_the_twin(
    counts: list[int], channels: int, dtype: torch.dtype, kind: str, device: torch.device
) -> None:
    density, values, t, offsets = scene(counts, channels, dtype, device)
    step = steps(kind, t)
    twins = [x.double() for x in (density, values, t)]
    for x in (density, values, twins[0], twins[1]):
        x.requires_grad_()
    actual = composite(density, values, t, step, offsets)
    twin_step = step.double() if isinstance(step, Tensor) else step
    expected = composite_reference(*twins, twin_step, offsets)
    grads = [torch.randn_like(x) for x in actual]
    gradient = torch.autograd.grad(actual, (density, values), grads)
    expected_gradient = torch.autograd.grad(expected, twins[:2], [g.double() for g in grads])
    # Sums of up to 1023 terms. In float64 the twin, with its sum over all rays, rounds no less than the core does.
    for a, e in zip((*actual, *gradient), (*expected, *expected_gradient), strict=True):
        assert_near(a, e, roundings=64 if dtype == torch.float32 else 256)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output", range(4), ids=["weights", "opacity", "depth", "accumulated"])
def test_gradient_of_each_output_alone(output: int, kind: str, device: torch.device) -> None:
    density, values, t, offsets = scene([3, 0, 40, 1], 3, torch.float64, device)
    step = steps(kind, t)
    density.requires_grad_()
    values.requires_grad_()
    weight = torch.randn_like(composite(density, values, t, step, offsets)[output])
    loss = (composite(density, values, t, step, offsets)[output] * weight).sum()
    expected = (composite_reference(density, values, t, step, offsets)[output] * weight).sum()
    wanted = torch.autograd.grad(expected, (density, values), allow_unused=True, materialize_grads=True)
    for a, e in zip(torch.autograd.grad(loss, (density, values)), wanted, strict=True):
        assert_near(a, e, roundings=64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3, 6])
def test_gradcheck(channels: int, kind: str) -> None:
    density, values, t, offsets = scene([2, 0, 4, 1], channels, torch.float64, torch.device("cpu"))
    step = steps(kind, t)
    density.requires_grad_()
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda d, v: composite(d, v, t, step, offsets), (density, values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_lengths_are_a_step(dtype: torch.dtype, device: torch.device) -> None:
    density, values, t, offsets = scene([3, 0, 113, 1], 3, dtype, device)
    density.requires_grad_()
    values.requires_grad_()
    results = []
    for step in (STEP, torch.full_like(t, STEP)):
        outputs = composite(density, values, t, step, offsets)
        gradient = torch.autograd.grad(outputs, (density, values), [torch.ones_like(x) for x in outputs])
        results.append((*outputs, *gradient))
    for a, e in zip(*results, strict=True):
        assert_near(a, e, roundings=16)


def test_a_sample_in_two_parts_weighs_the_same(device: torch.device) -> None:
    """The meaning of a length: halves of a sample, one behind the other, add up to it."""
    density = torch.tensor([3.0, 7.0, 1.0], dtype=torch.float64, device=device)
    lengths = torch.tensor([0.1, 0.3, 0.02], dtype=torch.float64, device=device)
    values = torch.randn(3, 2, dtype=torch.float64, device=device)
    whole, halves = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (3, 6))
    one = composite(density, values, density, lengths, whole)
    two = composite(*(x.repeat_interleave(2, 0) for x in (density, values, density, 0.5 * lengths)), halves)
    assert_near(two[0].view(3, 2).sum(dim=1), one[0], roundings=8)
    assert_near(two[3], one[3], roundings=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_density_has_its_closed_form(dtype: torch.dtype, device: torch.device) -> None:
    n = 500
    density = torch.full((n,), 4.0, dtype=dtype, device=device)
    t = (torch.arange(n, dtype=dtype, device=device) + 0.5) * 0.01
    offsets = torch.tensor([0, n], dtype=torch.int32, device=device)
    weights, opacity, _, accumulated = composite(
        density, torch.ones(n, 1, dtype=dtype, device=device), t, 0.01, offsets
    )
    k = torch.arange(n, dtype=torch.float64, device=device)
    assert_near(weights, torch.exp(-0.04 * k) * -math.expm1(-0.04), roundings=64)
    assert_near(opacity, torch.full_like(opacity, -math.expm1(-0.04 * n)), roundings=8)
    assert_near(accumulated[0], opacity.double(), roundings=64)


def test_thin_samples_keep_their_digits(device: torch.device) -> None:
    """1 - exp(-x) of a small x, computed as such, has no digit right in float32."""
    density = torch.full((4,), 1e-7, device=device)
    offsets = torch.tensor([0, 4], dtype=torch.int32, device=device)
    weights, opacity, *_ = composite(
        density, torch.ones(4, 1, device=device), torch.ones(4, device=device), 0.1, offsets
    )
    torch.testing.assert_close(weights, torch.full_like(weights, 1e-8), rtol=1e-6, atol=0)
    torch.testing.assert_close(opacity, torch.full_like(opacity, 4e-8), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dense", [math.inf, 1e30])
@pytest.mark.parametrize("place", [0, 5, 39])
def test_opaque_sample(dense: float, place: int, device: torch.device) -> None:
    """Behind an infinite density there is nothing, and no gradient is NaN."""
    density, values, t, offsets = scene([40, 40], 3, torch.float32, device)
    density[place] = dense
    density.requires_grad_()
    values.requires_grad_()
    outputs = composite(density, values, t, STEP, offsets)
    expected = composite_reference(density, values, t, STEP, offsets)
    assert outputs[0][place + 1 : 40].abs().sum() == 0
    assert outputs[1][0] == 1
    gradient = torch.autograd.grad(outputs, (density, values), [torch.ones_like(x) for x in outputs])
    wanted = torch.autograd.grad(expected, (density, values), [torch.ones_like(x) for x in expected])
    assert gradient[0][place] == 0
    for a, e in zip((*outputs, *gradient), (*expected, *wanted), strict=True):
        assert torch.isfinite(a).all()
        assert_near(a, e, roundings=64)


@pytest.mark.parametrize("kind", KINDS)
def test_a_negative_density_is_none(kind: str, device: torch.device) -> None:
    density, values, t, offsets = scene([7, 0, 40], 3, torch.float64, device)
    step, density = steps(kind, t), density - 3.0
    gradients = []
    for function, given in ((composite, density), (composite_reference, density), (composite, density.clamp(min=0))):
        given = given.clone().requires_grad_()
        outputs = function(given, values, t, step, offsets)
        assert (outputs[1] >= 0).all()
        sum(output.square().sum() for output in outputs).backward()
        gradients.append(given.grad)
    negative = density < 0
    assert 0 < negative.sum() < density.numel()
    for gradient in gradients[:2]:
        assert (gradient[negative] == 0).all()
        torch.testing.assert_close(gradient[~negative], gradients[2][~negative])


def test_a_sample_of_no_length_has_no_weight(device: torch.device) -> None:
    """Whatever its density; the others weigh what they do without it."""
    density, values, t, offsets = scene([7, 0, 40, 1], 3, torch.float64, device)
    step = torch.rand_like(t) + 0.01
    empty = torch.arange(48, device=device) % 3 == 0
    step[empty], density[empty], density[6] = 0.0, 9.0, math.inf
    kept = torch.nn.functional.pad((~empty).long().cumsum(0), (1, 0))[offsets.long()].to(torch.int32)
    density.requires_grad_()
    values.requires_grad_()
    outputs = composite(density, values, t, step, offsets)
    fewer = composite(density[~empty], values[~empty], t[~empty], step[~empty], kept)
    twins = composite_reference(density, values, t, step, offsets)
    assert (outputs[0][empty] == 0).all()
    assert_near(outputs[0][~empty], fewer[0], roundings=1)  # lanes of a GPU add them up in another order
    for output in (outputs, twins):
        for a, e in zip(output[1:], fewer[1:], strict=True):
            assert_near(a, e, roundings=256)
    wanted = torch.autograd.grad([x.sum() for x in fewer], (density, values))
    for output in (outputs, twins):
        gradient = torch.autograd.grad([x.sum() for x in output], (density, values))
        for a, e in zip(gradient, wanted, strict=True):
            assert_near(a, e, roundings=256)
            assert (a[empty] == 0).all()


def test_opacity_never_exceeds_one(device: torch.device) -> None:
    density, values, t, offsets = scene([1000] * 20, 1, torch.float32, device)
    opacity = composite(density * 10, values, t, STEP, offsets)[1]
    assert opacity.max() <= 1
    assert opacity.max() > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_unused_rest_of_a_buffer(kind: str, device: torch.device) -> None:
    density, values, t, offsets = scene([7, 3, 5], 3, torch.float32, device)
    step = steps(kind, t)
    offsets = offsets[:-1]  # the last five samples belong to no ray
    density[10:] = math.nan
    if isinstance(step, Tensor):
        step[10:] = 0.0
    density.requires_grad_()
    values.requires_grad_()
    outputs = composite(density, values, t, step, offsets)
    expected = composite_reference(density, values, t, step, offsets)
    for a, e in zip(outputs, expected, strict=True):
        assert_near(a, e, roundings=16)
    gradient = torch.autograd.grad(outputs, (density, values), [torch.ones_like(x) for x in outputs])
    assert all(g[10:].abs().sum() == 0 for g in gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_strided_arguments(kind: str, device: torch.device) -> None:
    density, values, t, offsets = scene([7, 30, 5], 3, torch.float32, device)
    step = steps(kind, t)
    strided = (torch.stack([density, density], 1)[:, 0], values.t().contiguous().t(), torch.stack([t, t], 1)[:, 1])
    assert not any(x.is_contiguous() for x in strided)
    expected = composite(density, values, t, step, offsets)
    strided_step = torch.stack([step, step], 1)[:, 0] if isinstance(step, Tensor) else step
    actual = composite(*strided, strided_step, torch.stack([offsets, offsets], 1)[:, 0])
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    values.requires_grad_()
    total = composite(density, values, t, strided_step, offsets)[3].sum()  # its gradient is an expanded scalar
    assert torch.equal(torch.autograd.grad(total, values)[0], expected[0].unsqueeze(1).expand(-1, 3))


def test_same_bits_for_any_number_of_threads() -> None:
    density, values, t, offsets = scene([17] * 1023, 3, torch.float32, torch.device("cpu"))
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(composite(density, values, t, STEP, offsets))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, e) for other in results[1:] for a, e in zip(other, results[0], strict=True))


def test_no_second_derivative(device: torch.device) -> None:
    density, values, t, offsets = scene([4], 1, torch.float32, device)
    density.requires_grad_()
    (gradient,) = torch.autograd.grad(composite(density, values, t, STEP, offsets)[1].sum(), density, create_graph=True)
    with pytest.raises(RuntimeError, match="composite_backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype: torch.dtype, kind: str, device: torch.device) -> None:
    density, values, t, offsets = scene([2, 0, 4], 3, dtype, device)
    lengths, step = (None, STEP) if kind == "one step" else (steps(kind, t), 0.0)
    density.requires_grad_()
    values.requires_grad_()
    torch.library.opcheck(torch.ops.dreamfusion_fast.composite.default, (density, values, t, lengths, step, offsets))
    density, values = density.detach(), values.detach()
    weights = composite(density, values, t, STEP, offsets)[0]
    arguments = (
        density,
        values,
        t,
        lengths,
        step,
        offsets,
        weights,
        None,
        torch.ones(3, dtype=dtype, device=device),
        None,
        None,
    )
    torch.library.opcheck(torch.ops.dreamfusion_fast.composite_backward.default, arguments)


def wrong_arguments() -> list[tuple[dict[str, object], type[Exception], str]]:
    return [
        ({"density": torch.rand(6, 1)}, ValueError, r"density must have shape \[n_samples\]"),
        ({"density": torch.ones(6, dtype=torch.int64)}, TypeError, "density must be torch.float32"),
        ({"density": [1.0]}, TypeError, r"density must be a torch.Tensor, got list"),
        ({"values": torch.rand(5, 3)}, ValueError, "values has 5 rows, density has 6"),
        ({"values": torch.rand(6, 3).double()}, TypeError, "values must be torch.float32"),
        ({"values": torch.rand(6, 0)}, ValueError, "values must have at least one channel"),
        ({"t": torch.rand(7)}, ValueError, "t has 7 rows"),
        ({"offsets": torch.tensor([0.0, 6.0])}, TypeError, "offsets must be torch.int32, got torch.float32"),
        ({"offsets": torch.tensor([0, 2**32])}, ValueError, "there are 6 samples, got offsets from 0 to"),
        ({"offsets": torch.tensor([-(2**32), 6])}, ValueError, "there are 6 samples, got offsets from -1 to 6"),
        ({"offsets": torch.zeros(0, dtype=torch.int32)}, ValueError, "offsets must have n_rays"),
        (
            {"offsets": torch.tensor([0, 7], dtype=torch.int32)},
            ValueError,
            "there are 6 samples, got offsets from 0 to 7",
        ),
        ({"offsets": torch.tensor([1, 6], dtype=torch.int32)}, ValueError, "offsets must rise from 0"),
        ({"offsets": torch.tensor([0, 5, 2, 6], dtype=torch.int32)}, ValueError, "offsets must rise"),
        ({"step": 0.0}, ValueError, "step must be positive and finite, got 0.0"),
        ({"step": torch.rand(5)}, ValueError, "step has 5 rows, density has 6"),
        ({"step": torch.rand(6, 1)}, ValueError, r"step must have shape \[n_samples\], got \[6, 1\]"),
        ({"step": torch.rand(6).double()}, TypeError, "step must be torch.float32, got torch.float64"),
        ({"step": torch.full((6,), -0.5)}, ValueError, "step must be finite and not below 0, got -0.5 to -0.5"),
        ({"step": torch.full((6,), math.inf)}, ValueError, "step must be finite and not below 0, got inf to inf"),
        ({"step": math.nan}, ValueError, "step must be positive and finite, got nan"),
    ]


@pytest.mark.parametrize(
    ("change", "error", "message"), wrong_arguments(), ids=lambda x: x if isinstance(x, str) else ""
)
def test_wrong_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {
        "density": torch.rand(6),
        "values": torch.rand(6, 3),
        "t": torch.rand(6),
        "step": STEP,
        "offsets": torch.tensor([0, 2, 6], dtype=torch.int32),
    }
    with pytest.raises(error, match=message):
        composite(**{**arguments, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", [composite, composite_reference])
@pytest.mark.parametrize("kind", KINDS)
def test_16_bits_are_taken_in_float32(kind: str, op: object, half: torch.dtype, device: torch.device) -> None:
    """Also beside float32, as autocast leaves some: the results are float32, the gradients of the given types."""
    density, values, t, offsets = scene([5, 0, 113], 3, torch.float32, device)
    step = steps(kind, t)
    narrow = density.to(half).requires_grad_(), values.to(half).requires_grad_()
    wide = [x.detach().float().requires_grad_() for x in narrow]
    if isinstance(step, Tensor):
        step = step.to(half).float()
    for t_given, step_given in ((t, step), (t.to(half), step.to(half) if isinstance(step, Tensor) else step)):
        actual = op(*narrow, t_given, step_given, offsets)
        expected = op(*wide, t_given.float(), step, offsets)
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == torch.float32
            assert_near(a, e, 8)  # a GPU adds up the twin's sums in any order
        grads = torch.autograd.grad(sum(x.square().sum() for x in actual), narrow)
        wanted = torch.autograd.grad(sum(x.square().sum() for x in expected), wide)
        for grad, want in zip(grads, wanted, strict=True):
            assert grad.dtype == half
            assert_near(grad, want.to(half), 2)


@pytest.mark.parametrize("op", [composite, composite_reference])
def test_offsets_may_be_of_64_bits(op: object, device: torch.device) -> None:
    density, values, t, offsets = scene([5, 0, 31], 3, torch.float64, device)
    actual, expected = (op(density, values, t, STEP, given) for given in (offsets.long(), offsets))
    for a, e in zip(actual, expected, strict=True):
        assert_near(a, e, 8)


@pytest.mark.gpu
def test_offsets_beyond_the_buffer_stay_inside_it_on_the_gpu() -> None:
    """A march into a buffer that is too small says so by its offsets, which nobody waits to read."""
    density, values, t, offsets = scene([7, 30, 5], 3, torch.float32, torch.device("cuda"))
    kept = offsets.clamp(max=20)
    density[20:] = math.nan
    for step in (STEP, torch.full_like(t[:20], STEP)):
        actual = composite(density[:20], values[:20], t[:20], step, offsets)
        expected = composite(density[:20], values[:20], t[:20], step, kept)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
        assert actual[2].isfinite().all()
