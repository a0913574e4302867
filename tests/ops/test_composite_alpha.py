"""Compositing by alpha: native core against the twin, known answers, and alphas of 0 and 1."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.ops import composite, composite_alpha, composite_alpha_reference

COUNTS = [[], [0], [1], [0, 0, 5, 0, 1, 31, 32, 33, 0], [1023, 0, 113], [2] * 113]


def scene(counts: list[int], channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Random alphas, some of them 0 and 1, values, t and offsets for rays with these numbers of samples."""
    m = sum(counts)
    alpha = torch.rand(m, dtype=torch.float64) ** 4
    kind = torch.rand(m)
    alpha[kind < 0.1], alpha[kind > 0.98] = 0.0, 1.0
    values = torch.randn(m, channels, dtype=torch.float64)
    t = 1 + torch.rand(m, dtype=torch.float64)
    offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    return *(x.to(device, dtype) for x in (alpha, values, t)), offsets.to(device)


def assert_near(actual: Tensor, expected: Tensor, roundings: float) -> None:
    """Within so many roundings of the dtype of `actual`, relative to the largest expected value (or 1)."""
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return
    scale = max(1.0, expected.abs().max().item())
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= roundings * torch.finfo(actual.dtype).eps * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_matches_the_twin(counts: list[int], channels: int, dtype: torch.dtype, device: torch.device) -> None:
    alpha, values, t, offsets = scene(counts, channels, dtype, device)
    twins = [x.double() for x in (alpha, values, t)]
    for x in (alpha, values, twins[0], twins[1]):
        x.requires_grad_()
    actual = composite_alpha(alpha, values, t, offsets)
    expected = composite_alpha_reference(*twins, offsets)
    grads = [torch.randn_like(x) for x in actual]
    gradient = torch.autograd.grad(actual, (alpha, values), grads)
    expected_gradient = torch.autograd.grad(expected, twins[:2], [g.double() for g in grads])
    for a, e in zip((*actual, *gradient), (*expected, *expected_gradient), strict=True):
        assert_near(a, e, roundings=64)


def test_long_rays_of_thin_samples_keep_their_digits(device: torch.device) -> None:
    """Each alpha is below a rounding of 1: a product of 1 - alpha would stay 1."""
    n, thin = 2000, 2e-8
    alpha = torch.full((n,), thin, device=device)
    offsets = torch.tensor([0, n], dtype=torch.int32, device=device)
    ones = torch.ones(n, 1, device=device)
    weights, opacity, *_ = composite_alpha(alpha, ones, ones[:, 0], offsets)
    assert opacity.item() == pytest.approx(-math.expm1(n * math.log1p(-thin)), rel=n * 2.0**-24)  # of the sum
    assert weights[-1].item() == pytest.approx(thin * (1 - thin) ** (n - 1), rel=1e-6)


@pytest.mark.parametrize("output", range(4), ids=["weights", "opacity", "depth", "accumulated"])
def test_gradient_of_each_output_alone(output: int, device: torch.device) -> None:
    alpha, values, t, offsets = scene([3, 0, 70, 1], 3, torch.float64, device)
    alpha.requires_grad_()
    values.requires_grad_()
    weight = torch.randn_like(composite_alpha(alpha, values, t, offsets)[output])
    loss = (composite_alpha(alpha, values, t, offsets)[output] * weight).sum()
    expected = (composite_alpha_reference(alpha, values, t, offsets)[output] * weight).sum()
    wanted = torch.autograd.grad(expected, (alpha, values), allow_unused=True, materialize_grads=True)
    for a, e in zip(torch.autograd.grad(loss, (alpha, values)), wanted, strict=True):
        assert_near(a, e, roundings=64)


def test_gradcheck() -> None:
    alpha, values, t, offsets = scene([2, 0, 4, 1], 3, torch.float64, torch.device("cpu"))
    alpha = alpha.clamp(0.05, 0.95)
    alpha.requires_grad_()
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, v: composite_alpha(a, v, t, offsets), (alpha, values))


def product_rule(alpha: Tensor, grad: Tensor, grad_opacity: float) -> Tensor:
    """The gradient along one ray from each weight's, written out: nothing is divided, so alphas may be 0 and 1."""
    n = alpha.shape[0]
    gradient = []
    for i in range(n):
        before = math.prod(1 - float(a) for a in alpha[:i])
        total = before * float(grad[i])
        for j in range(i + 1, n):
            between = math.prod(1 - float(a) for a in alpha[i + 1 : j])
            total -= before * between * float(alpha[j] * grad[j])
        behind = math.prod(1 - float(a) for a in alpha[i + 1 :])
        gradient.append(total + grad_opacity * before * behind)
    return torch.tensor(gradient, dtype=torch.float64)


ENDS = [[1.0], [0.0], [0.3, 1.0, 0.4], [1.0, 1.0, 0.2], [0.0, 1.0, 0.0], [0.5, 0.0, 0.7, 1.0], [0.0] * 5]


@pytest.mark.parametrize("ends", ENDS, ids=str)
def test_gradient_where_alpha_is_zero_or_one(ends: list[float], device: torch.device) -> None:
    alpha = torch.tensor(ends, dtype=torch.float64, device=device, requires_grad=True)
    offsets = torch.tensor([0, len(ends)], dtype=torch.int32, device=device)
    grad, values, t = (torch.randn(len(ends), dtype=torch.float64, device=device) for _ in range(3))
    weights, opacity, depth, accumulated = composite_alpha(alpha, values[:, None], t, offsets)
    loss = (weights * grad).sum() + 0.7 * opacity.sum() - 2 * depth.sum() + 3 * accumulated.sum()
    (gradient,) = torch.autograd.grad(loss, alpha)
    wanted = product_rule(alpha.detach().cpu(), (grad - 2 * t + 3 * values).cpu(), 0.7)
    assert_near(gradient.cpu(), wanted, roundings=32)
    for inside in ([max(min(a, 1 - 1e-6), 1e-6) for a in ends],):  # the one-sided difference
        moved = torch.tensor(inside, dtype=torch.float64, device=device)
        other = composite_alpha(moved, values[:, None], t, offsets)
        change = (other[0] * grad).sum() + 0.7 * other[1].sum() - 2 * other[2].sum() + 3 * other[3].sum() - loss
        torch.testing.assert_close(change, (gradient * (moved - alpha)).sum(), rtol=0, atol=1e-9)


def test_alphas_of_densities_composite_as_these(device: torch.device) -> None:
    _, values, t, offsets = scene([7, 0, 40, 1], 3, torch.float64, device)
    density, length = 30 * torch.rand_like(t), torch.rand_like(t) + 0.01
    expected = composite(density, values, t, length, offsets)
    for a, e in zip(composite_alpha(-torch.expm1(-density * length), values, t, offsets), expected, strict=True):
        assert_near(a, e, roundings=64)


def test_alphas_out_of_range_are_clamped_and_get_no_gradient(device: torch.device) -> None:
    alpha, values, t, offsets = scene([7, 0, 40], 3, torch.float64, device)
    alpha = 1.6 * alpha - 0.3
    gradients = []
    for function, given in (
        (composite_alpha, alpha),
        (composite_alpha_reference, alpha),
        (composite_alpha, alpha.clamp(0, 1)),
    ):
        given = given.clone().requires_grad_()
        outputs = function(given, values, t, offsets)
        sum(output.square().sum() for output in outputs).backward()
        gradients.append(given.grad)
    out = (alpha < 0) | (alpha > 1)
    assert 0 < out.sum() < alpha.numel()
    for gradient in gradients[:2]:
        assert (gradient[out] == 0).all()
        torch.testing.assert_close(gradient[~out], gradients[2][~out])


def test_a_nan_stays_one(device: torch.device) -> None:
    alpha, values, t, offsets = scene([4, 4], 1, torch.float32, device)
    alpha[5] = math.nan
    outputs = composite_alpha(alpha, values, t, offsets)
    assert all(bool(x[0].isfinite().all()) and bool(x[1].isnan().all()) for x in outputs[1:])


def test_unused_rest_of_a_buffer(device: torch.device) -> None:
    alpha, values, t, offsets = scene([7, 3, 5], 3, torch.float32, device)
    offsets = offsets[:-1]  # the last five samples belong to no ray
    alpha[10:] = math.nan
    alpha.requires_grad_()
    values.requires_grad_()
    outputs = composite_alpha(alpha, values, t, offsets)
    for a, e in zip(outputs, composite_alpha_reference(alpha, values, t, offsets), strict=True):
        assert_near(a, e, roundings=16)
    gradient = torch.autograd.grad(outputs, (alpha, values), [torch.ones_like(x) for x in outputs])
    assert all(g[10:].abs().sum() == 0 for g in gradient)


def test_strided_arguments(device: torch.device) -> None:
    alpha, values, t, offsets = scene([7, 30, 5], 3, torch.float32, device)
    strided = (torch.stack([alpha, alpha], 1)[:, 0], values.t().contiguous().t(), torch.stack([t, t], 1)[:, 1])
    expected = composite_alpha(alpha, values, t, offsets)
    actual = composite_alpha(*strided, torch.stack([offsets, offsets], 1)[:, 0])
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype: torch.dtype, device: torch.device) -> None:
    alpha, values, t, offsets = scene([2, 0, 4], 3, dtype, device)
    alpha.requires_grad_()
    values.requires_grad_()
    torch.library.opcheck(torch.ops.dreamfusion_fast.composite_alpha.default, (alpha, values, t, offsets))
    alpha, values = alpha.detach(), values.detach()
    weights = composite_alpha(alpha, values, t, offsets)[0]
    arguments = (alpha, values, t, offsets, weights, None, torch.ones(3, dtype=dtype, device=device), None, None)
    torch.library.opcheck(torch.ops.dreamfusion_fast.composite_alpha_backward.default, arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"alpha": torch.rand(6, 1)}, ValueError, r"alpha must have shape \[n_samples\]"),
        ({"alpha": torch.ones(6, dtype=torch.int64)}, TypeError, "alpha must be torch.float32"),
        ({"values": torch.rand(5, 3)}, ValueError, "values has 5 rows, alpha has 6"),
        ({"t": torch.rand(7)}, ValueError, "t has 7 rows, alpha has 6"),
        ({"offsets": torch.tensor([0.0, 6.0])}, TypeError, "offsets must be torch.int32, got torch.float32"),
        ({"offsets": torch.tensor([0, 2**32])}, ValueError, "there are 6 samples"),
        ({"offsets": torch.tensor([0, 7], dtype=torch.int32)}, ValueError, "there are 6 samples"),
    ],
)
def test_wrong_arguments(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    arguments = {
        "alpha": torch.rand(6),
        "values": torch.rand(6, 3),
        "t": torch.rand(6),
        "offsets": torch.tensor([0, 2, 6], dtype=torch.int32),
    }
    with pytest.raises(error, match=f"composite_alpha: {message}" if "must" in message else message):
        composite_alpha(**{**arguments, **change})


@pytest.mark.parametrize("op", [composite_alpha, composite_alpha_reference])
def test_16_bits_and_offsets_of_64(op: object, device: torch.device) -> None:
    draws = torch.Generator().manual_seed(0)
    alpha, values = torch.rand(113, generator=draws), torch.rand(113, 3, generator=draws)
    t, offsets = torch.arange(113.0).to(device), torch.tensor([0, 31, 31, 113], device=device)
    alpha, values = alpha.to(device, torch.bfloat16), values.to(device, torch.float16)
    actual = op(alpha.requires_grad_(), values, t, offsets)
    expected = op(alpha.float(), values.float(), t, offsets.int())
    assert all(torch.equal(a, e) and a.dtype == torch.float32 for a, e in zip(actual, expected, strict=True))
    (gradient,) = torch.autograd.grad(actual[1].sum(), alpha)
    assert gradient.dtype == torch.bfloat16
