"""Opacity and density of signed distances, against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from dreamfusion_fast.fields.sdf import neus_alpha, volsdf_density


@pytest.mark.parametrize("count", [0, 1, 113])
def test_neus_alpha_is_its_formula(count: int) -> None:
    draws = torch.Generator().manual_seed(1)
    distance = torch.randn(count, generator=draws, dtype=torch.float64)
    cosine = 2 * torch.rand(count, generator=draws, dtype=torch.float64) - 1
    length = 0.3 * torch.rand(count, generator=draws, dtype=torch.float64)
    for sharpness in (torch.tensor(3.0), torch.tensor(20.0)):
        start, end = (torch.sigmoid(sharpness * (distance - s * 0.5 * cosine * length)) for s in (1, -1))
        torch.testing.assert_close(
            neus_alpha(distance, cosine, length, sharpness), ((start - end) / start).clamp(min=0), rtol=1e-9, atol=1e-12
        )


def test_neus_alpha_far_inside_is_finite() -> None:
    """There both logistic functions underflow, and their quotient is exp(sharpness * cosine * length)."""
    distance = torch.tensor([-50.0], requires_grad=True)
    alpha = neus_alpha(distance, torch.tensor([-0.5]), torch.tensor([0.1]), torch.tensor(100.0))
    torch.testing.assert_close(alpha, torch.tensor([-math.expm1(-5.0)]), rtol=1e-4, atol=0)
    alpha.sum().backward()
    assert distance.grad.isfinite().all()


def test_volsdf_density_is_its_formula() -> None:
    distance = torch.linspace(-2, 2, 41, dtype=torch.float64)
    for beta in (0.05, 0.7):
        laplace = torch.distributions.Laplace(0.0, beta)
        expected = laplace.cdf(-distance.float()).double() / beta
        torch.testing.assert_close(
            volsdf_density(distance, torch.tensor(beta, dtype=torch.float64)), expected, rtol=1e-4, atol=1e-5
        )


def test_gradients() -> None:
    draws = torch.Generator().manual_seed(2)
    distance, cosine = (torch.randn(7, generator=draws, dtype=torch.float64, requires_grad=True) for _ in range(2))
    sharpness = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    length = torch.full((7,), 0.2, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda f, c, s: neus_alpha(f, -c.abs() - 0.1, length, s), (distance, cosine, sharpness)
    )
    assert torch.autograd.gradcheck(volsdf_density, (distance, sharpness))


def test_volsdf_gradient_on_the_surface() -> None:
    """The density has a derivative there, -1 / (2 beta^2), though |f| has none."""
    distance = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    beta = torch.tensor([0.5, 0.1, 2.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(volsdf_density(distance, beta).sum(), distance)
    torch.testing.assert_close(gradient, -0.5 / beta.square(), rtol=1e-14, atol=0.0)
