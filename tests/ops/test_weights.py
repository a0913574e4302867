"""Weights and transmittance of samples: native core against the twins, against `composite`, and at the ends."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.ops import (
    composite,
    composite_alpha,
    weights_from_alpha,
    weights_from_alpha_reference,
    weights_from_density,
    weights_from_density_reference,
)

COUNTS = [[], [0], [1], [0, 0, 5, 0, 1, 31, 32, 33, 0], [1023, 0, 113], [2] * 113]
KINDS = ["one step", "lengths", "alpha"]
STEP = 0.03

Weigh = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def functions(kind: str, length: Tensor) -> tuple[Weigh, Weigh]:
    """The op and its twin in float64, as functions of density or alpha, and of offsets."""
    if kind == "alpha":
        return weights_from_alpha, weights_from_alpha_reference
    step = STEP if kind == "one step" else length
    twin_step = step.double() if isinstance(step, Tensor) else step
    return (
        lambda x, offsets: weights_from_density(x, step, offsets),
        lambda x, offsets: weights_from_density_reference(x, twin_step, offsets),
    )


def scene(counts: list[int], kind: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Density or alpha, lengths of which some are 0, and offsets."""
    m = sum(counts)
    absorbing, length = torch.rand(m, dtype=torch.float64) ** 4, 0.06 * torch.rand(m, dtype=torch.float64)
    opaque = torch.rand(m) > 0.98
    length[torch.rand(m) < 0.1] = 0.0
    absorbing *= 1 if kind == "alpha" else 30
    absorbing[opaque] = 1.0 if kind == "alpha" else math.inf
    offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    return absorbing.to(device, dtype), length.to(device, dtype), offsets.to(device)


def assert_near(actual: Tensor, expected: Tensor, roundings: float) -> None:
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return
    scale = max(1.0, expected.abs().max().item())
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= roundings * torch.finfo(actual.dtype).eps * scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_matches_the_twin(counts: list[int], dtype: torch.dtype, kind: str, device: torch.device) -> None:
    absorbing, length, offsets = scene(counts, kind, dtype, device)
    function, twin = functions(kind, length)
    wide = absorbing.double().requires_grad_()
    absorbing.requires_grad_()
    actual, expected = function(absorbing, offsets), twin(wide, offsets)
    grads = [torch.randn_like(x) for x in actual]
    for given in (grads, [grads[0], None], [None, grads[1]]):
        pairs = [(a, e, g) for a, e, g in zip(actual, expected, given, strict=True) if g is not None]
        outputs, twins, weights = zip(*pairs, strict=True)
        (gradient,) = torch.autograd.grad(outputs, absorbing, weights, retain_graph=True)
        wanted = torch.autograd.grad(twins, wide, [g.double() for g in weights], retain_graph=True)[0]
        for a, e in zip((*actual, gradient), (*expected, wanted), strict=True):
            assert_near(a, e, roundings=128)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_composite(kind: str, device: torch.device) -> None:
    absorbing, length, offsets = scene([7, 0, 40, 1], kind, torch.float32, device)
    values = torch.rand(48, 2, device=device)
    weights, transmittance = functions(kind, length)[0](absorbing, offsets)
    if kind == "alpha":
        expected = composite_alpha(absorbing, values, values[:, 0], offsets)
    else:
        step = STEP if kind == "one step" else length
        expected = composite(absorbing, values, values[:, 0], step, offsets)
    assert_near(weights, expected[0], roundings=1)
    assert (transmittance[offsets[[0, 1, 3]].long()] == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    absorbing, length, offsets = scene([2, 0, 4, 1], kind, torch.float64, torch.device("cpu"))
    absorbing = absorbing.clamp(0.05, 0.95 if kind == "alpha" else 30).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: functions(kind, length)[0](x, offsets), absorbing)


def test_by_hand(device: torch.device) -> None:
    alpha = torch.tensor([0.5, 0.25, 1.0, 0.5], dtype=torch.float64, device=device, requires_grad=True)
    offsets = torch.tensor([0, 4], dtype=torch.int32, device=device)
    weights, transmittance = weights_from_alpha(alpha, offsets)
    torch.testing.assert_close(weights.tolist(), [0.5, 0.125, 0.375, 0.0])
    torch.testing.assert_close(transmittance.tolist(), [1.0, 0.5, 0.375, 0.0])
    # d T_3 / d alpha_j, T_3 = (1 - a_0)(1 - a_1)(1 - a_2)
    (gradient,) = torch.autograd.grad(transmittance[3], alpha)
    torch.testing.assert_close(gradient.tolist(), [0.0, 0.0, -0.375, 0.0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype: torch.dtype, kind: str, device: torch.device) -> None:
    absorbing, length, offsets = scene([2, 0, 4], kind, dtype, device)
    lengths, step = (length, 0.0) if kind == "lengths" else (None, STEP)
    absorbing.requires_grad_()
    arguments = (absorbing, lengths, step, offsets, kind == "alpha")
    torch.library.opcheck(torch.ops.dreamfusion_fast.sample_weights.default, arguments)
    absorbing = absorbing.detach()
    found = torch.ops.dreamfusion_fast.sample_weights(absorbing, *arguments[1:])
    grads = (torch.ones_like(absorbing), None)
    every = (absorbing, *arguments[1:], *found, *grads)
    torch.library.opcheck(torch.ops.dreamfusion_fast.sample_weights_backward.default, every)


def test_unused_rest_and_strides(device: torch.device) -> None:
    alpha, _, offsets = scene([7, 3, 5], "alpha", torch.float32, device)
    twice, offsets = torch.stack([alpha, alpha], 1)[:, 0], offsets[:-1]
    twice.requires_grad_()
    outputs = weights_from_alpha(twice, offsets)
    for a, e in zip(outputs, weights_from_alpha_reference(twice, offsets), strict=True):
        assert (a[10:] == 0).all()
        assert_near(a, e, roundings=16)
    (gradient,) = torch.autograd.grad(outputs[1].sum(), twice)  # an expanded scalar
    assert (gradient[10:] == 0).all()


def test_wrong_arguments() -> None:
    x, offsets = torch.rand(6), torch.tensor([0, 2, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"weights_from_density: step must be positive and finite, got 0"):
        weights_from_density(x, 0, offsets)
    with pytest.raises(ValueError, match=r"weights_from_density: step must be finite and not below 0, got -1.0 to"):
        weights_from_density(x, -torch.ones(6), offsets)
    with pytest.raises(TypeError, match=r"weights_from_density: step must be torch.float32"):
        weights_from_density(x, torch.ones(6).double(), offsets)
    with pytest.raises(TypeError, match=r"weights_from_alpha: offsets must be torch.int32, got torch.float32"):
        weights_from_alpha(x, offsets.float())
    with pytest.raises(ValueError, match=r"weights_from_alpha: offsets must rise from 0"):
        weights_from_alpha(x, torch.tensor([0, 2**32]))
    with pytest.raises(ValueError, match=r"weights_from_alpha: offsets must rise from 0 .* got offsets from 0 to 6"):
        weights_from_alpha(x[:5], offsets)


@pytest.mark.parametrize("twin", [False, True])
def test_16_bits_and_offsets_of_64(twin: bool, device: torch.device) -> None:
    by_density = weights_from_density_reference if twin else weights_from_density
    by_alpha = weights_from_alpha_reference if twin else weights_from_alpha
    x = torch.rand(113, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    offsets = torch.tensor([0, 31, 31, 113], device=device)
    pairs = [
        (by_density(x, x, offsets), by_density(x.float(), x.float(), offsets.int())),
        (by_alpha(x, offsets), by_alpha(x.float(), offsets.int())),
    ]
    for actual, expected in pairs:
        assert all(torch.equal(a, e) and a.dtype == torch.float32 for a, e in zip(actual, expected, strict=True))
