"""Rays: shapes and the errors for rays that cannot be rendered."""

from __future__ import annotations

import pytest
import torch

from dreamfusion_fast.rendering import InvalidRaysError, Rays


def rays(count: int = 5) -> Rays:
    return Rays(torch.zeros(count, 3), torch.nn.functional.normalize(torch.randn(count, 3), dim=1))


@pytest.mark.parametrize("count", [0, 1, 113])
def test_good_rays_pass(count: int) -> None:
    rays(count).validate()
    assert len(rays(count)) == count


@pytest.mark.parametrize(
    ("origin", "direction", "message"),
    [
        ((0, 0, float("nan")), (0, 0, 1), "ray 3 is not finite"),
        ((0, 0, 0), (float("inf"), 0, 1), "ray 3 is not finite"),
        ((0, 0, 0), (0, 0, 0), "ray 3 has a direction of zero length"),
        ((0, 0, 0), (0, 0, 2), "ray 3 has a direction that is not of unit length"),
    ],
)
def test_bad_rays_are_named(origin: tuple, direction: tuple, message: str) -> None:
    bad = rays()
    bad.origins[3] = torch.tensor(origin)
    bad.directions[3] = torch.tensor(direction)
    with pytest.raises(InvalidRaysError, match=message):
        bad.validate()


def test_normalized_mends_lengths() -> None:
    long = Rays(torch.zeros(4, 3), 5 * torch.randn(4, 3))
    with pytest.raises(InvalidRaysError, match="not of unit length"):
        long.validate()
    long.normalized().validate()


def test_wrong_shapes_and_types_are_named() -> None:
    with pytest.raises(ValueError, match=r"rays.directions: got shape \[5, 2\]"):
        Rays(torch.zeros(5, 3), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="got 4 origins and 5 directions"):
        Rays(torch.zeros(4, 3), torch.zeros(5, 3))
    with pytest.raises(TypeError, match=r"rays.origins: got torch.int64"):
        Rays(torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"torch.float64"):
        Rays(torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 3))


def test_indexing() -> None:
    all_rays = rays(7)
    assert torch.equal(all_rays[2:4].directions, all_rays.directions[2:4])
    assert torch.equal(all_rays[torch.tensor([6, 0])].directions, all_rays.directions[[6, 0]])
