"""Spherical harmonics: against Legendre functions, orthonormality, gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dreamfusion_fast.fields import spherical_harmonics


def directions(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    draws = torch.randn(*shape, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.normalize(draws, dim=-1).to(dtype)


def legendre(band: int, order: int, z: np.ndarray) -> np.ndarray:
    """Associated Legendre function P_lm with the phase (-1)^m, by its recurrence."""
    value = (-1.0) ** order * math.prod(range(1, 2 * order, 2)) * (1.0 - z * z) ** (0.5 * order)
    before = np.zeros_like(z)
    for n in range(order + 1, band + 1):
        value, before = ((2 * n - 1) * z * value - (n + order - 1) * before) / (n - order), value
    return value


def expected(where: np.ndarray, degree: int) -> np.ndarray:
    """Real harmonics in spherical coordinates: sqrt(2) N P_lm times cos(m phi), or sin(|m| phi) for negative m."""
    azimuth, z = np.arctan2(where[:, 1], where[:, 0]), where[:, 2]
    result = []
    for band in range(degree):
        for m in range(-band, band + 1):
            order = abs(m)
            norm = math.sqrt(
                (2 * band + 1) / (4 * math.pi) * math.factorial(band - order) / math.factorial(band + order)
            )
            turn = np.ones_like(z)
            if m:
                turn = math.sqrt(2) * (np.cos(order * azimuth) if m > 0 else np.sin(order * azimuth))
            result.append(norm * legendre(band, order, z) * turn)
    return np.stack(result, axis=1)


@pytest.mark.parametrize("count", [0, 1, 113, 1023])
@pytest.mark.parametrize("degree", [1, 2, 3, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 3e-15)])
def test_against_legendre_functions(count: int, degree: int, dtype: torch.dtype, tolerance: float) -> None:
    where = directions(count, dtype=dtype)
    found = spherical_harmonics(where, degree)
    assert found.shape == (count, degree**2)
    assert found.dtype == dtype
    np.testing.assert_allclose(found.numpy(), expected(where.double().numpy(), degree), rtol=0, atol=tolerance)


def test_they_are_orthonormal() -> None:
    """By Gauss's rule in z and equal steps in azimuth, exact for the degree of the products."""
    z, weights = np.polynomial.legendre.leggauss(6)
    azimuth = 2 * np.pi * np.arange(12) / 12
    flat = np.sqrt(1 - z * z)[:, None]
    grid = np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), z[:, None] + 0 * azimuth], axis=-1)
    values = spherical_harmonics(torch.from_numpy(grid), 4).numpy()
    products = np.einsum("i,ijk,ijl->kl", weights * 2 * np.pi / 12, values, values)
    np.testing.assert_allclose(products, np.eye(16), rtol=0, atol=1e-14)


def test_poles_and_axes_have_no_special_cases() -> None:
    axes = torch.cat([torch.eye(3), -torch.eye(3)]).double()
    np.testing.assert_allclose(spherical_harmonics(axes, 4), expected(axes.numpy(), 4), rtol=0, atol=3e-15)


def test_leading_shapes_and_strides() -> None:
    where = directions(2, 5)
    assert torch.equal(spherical_harmonics(where, 3).view(-1, 9), spherical_harmonics(where.view(-1, 3), 3))
    strided = torch.cat([where, where], dim=-1)[..., :3]
    assert torch.equal(spherical_harmonics(strided, 4), spherical_harmonics(where, 4))
    assert spherical_harmonics(where[0, 0], 2).shape == (4,)


def test_gradients_of_first_and_second_order() -> None:
    where = directions(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda d: spherical_harmonics(d, 4), where)
    assert torch.autograd.gradgradcheck(lambda d: spherical_harmonics(d, 4), where)


@pytest.mark.parametrize(
    ("given", "degree", "error", "message"),
    [
        (torch.zeros(2, 3), 0, ValueError, "degree: got 0, want 1 to 4"),
        (torch.zeros(2, 3), 5, ValueError, "degree: got 5, want 1 to 4"),
        (torch.zeros(2, 4), 1, ValueError, r"directions: got shape \[2, 4\], want \[..., 3\]"),
        (torch.zeros(2, 3).int(), 1, TypeError, "directions: got torch.int32, want a floating-point tensor"),
        ([0.0, 0.0, 1.0], 1, TypeError, "directions: got list"),
    ],
)
def test_bad_arguments_are_named(given: Tensor, degree: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        spherical_harmonics(given, degree)
