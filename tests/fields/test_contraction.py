"""Contraction of unbounded space: the paper's equation, its inverse, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dreamfusion_fast.fields import contract, uncontract


def positions(count: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("count", [0, 1, 113, 1023])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-7), (torch.float64, 1e-15)])
def test_is_the_papers_equation(count: int, dtype: torch.dtype, tolerance: float) -> None:
    x = positions(count, 1.0).to(dtype)
    assert count < 100 or 0.1 < float((x.norm(dim=1) < 1).float().mean()) < 0.9
    wide = x.double().numpy()
    expected = []
    for point in wide:
        length = np.linalg.norm(point)
        expected.append(point if length <= 1 else (2 - 1 / length) * point / length)
    found = contract(x)
    assert found.dtype == dtype
    np.testing.assert_allclose(found.numpy(), np.array(expected).reshape(-1, 3), rtol=0, atol=tolerance)
    inside = x.norm(dim=1) < 1
    assert torch.equal(found[inside], x[inside])


@pytest.mark.parametrize("scale", [0.3, 1.0, 10.0, 1e3])
def test_the_inverse_brings_back(scale: float) -> None:
    x = positions(113, scale)
    # 2 - |contract(x)| = 1 / |x| has lost |x| of its digits.
    torch.testing.assert_close(uncontract(contract(x)), x, rtol=1e-14 * max(1.0, scale), atol=0)
    y = contract(x)
    torch.testing.assert_close(contract(uncontract(y)), y, rtol=0, atol=1e-15)


def test_far_points_are_at_the_border() -> None:
    """Also those whose squares overflow."""
    for far in (1e10, 1e30, 3e38):
        x = torch.tensor([[far, 0, 0], [0, -far, far], [0.5 * far, 0.5 * far, -far]], requires_grad=True)
        y = contract(x)
        torch.testing.assert_close(y, 2 * (x / far) / (x / far).norm(dim=1, keepdim=True))
        y.sum().backward()
        assert x.grad.isfinite().all()
    assert uncontract(torch.tensor([[2.0, 0, 0], [3.0, 0, 0]])).isnan().all()


def test_leading_shapes_and_strides() -> None:
    x = positions(10).view(2, 5, 3)
    assert torch.equal(contract(x).view(-1, 3), contract(x.view(-1, 3)))
    strided = torch.cat([x, x], dim=-1)[..., :3]
    assert torch.equal(contract(strided), contract(x))
    assert torch.equal(uncontract(contract(strided)), uncontract(contract(x)))


@pytest.mark.parametrize("function", [contract, lambda x: uncontract(0.5 * contract(x))])
def test_gradients_of_first_and_second_order(function) -> None:
    x = torch.cat([positions(4), 0.1 * positions(4), torch.zeros(1, 3, dtype=torch.float64)]).requires_grad_()
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_the_gradient_is_continuous_at_the_border() -> None:
    x = torch.tensor([[0.6, 0.0, 0.8]], dtype=torch.float64)
    inner, outer = (torch.autograd.functional.jacobian(contract, x * (1 + step))[0, :, 0] for step in (-1e-9, 1e-9))
    torch.testing.assert_close(outer, inner, rtol=0, atol=1e-8)
