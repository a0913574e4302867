"""A field that is fitted to another renders as that does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.fields import HashGridField, TriplaneField, TriplaneFieldConfig
from dreamfusion_fast.fields.base import Field, FieldOutput
from dreamfusion_fast.training.fitting import fit_field
from dreamfusion_fast.training.sections import SMALL_FIELD

STEP = 0.05


class Ball(Field):
    """A ball beside the middle of its box, red above and blue below."""

    CENTRE, RADIUS = (0.2, 0.0, -0.1), 0.45

    def __init__(self, density: float = 60.0, aabb: tuple[float, ...] = (-1, -1, -1, 1, 1, 1)) -> None:
        super().__init__(torch.tensor(aabb, dtype=torch.float32))
        self.most = density

    def forward(self, positions: Tensor, with_normal: bool = False) -> FieldOutput:
        return FieldOutput(
            self.density(positions),
            torch.where(
                positions[:, 1:2] > 0, positions.new_tensor([1.0, 0.0, 0.0]), positions.new_tensor([0.0, 0.0, 1.0])
            ),
        )

    def density(self, positions: Tensor) -> Tensor:
        inside = (positions - positions.new_tensor(self.CENTRE)).norm(dim=1) < self.RADIUS
        return self.most * inside.to(positions.dtype)


def difference(field: Field, source: Field) -> tuple[float, float]:
    """Mean error of a step's opacity, and of colours where there is something, at points away from surfaces."""
    points = torch.rand(4000, 3, generator=torch.Generator().manual_seed(5)) * 2 - 1
    away = ((points - torch.tensor(Ball.CENTRE)).norm(dim=1) - Ball.RADIUS).abs() > 0.05
    points = points[away & (points[:, 1].abs() > 0.05)].to(field.aabb)
    with torch.no_grad():
        made, wanted = field(points), source(points)
    opacity = [-torch.expm1(-output.density * STEP) for output in (made, wanted)]
    colour = (made.color - wanted.color).abs()[opacity[1] > 0.5]
    return float((opacity[0] - opacity[1]).abs().mean()), float(colour.mean())


def make(kind: str) -> Field:
    generator = torch.Generator().manual_seed(0)
    if kind == "grid":
        return HashGridField(SMALL_FIELD, generator=generator)
    return TriplaneField(TriplaneFieldConfig(resolution=32, features=8, hidden=16), generator=generator)


@pytest.mark.parametrize("kind", ["grid", "planes"])
def test_opacity_and_colour_are_those_of_the_other(kind: str) -> None:
    field, source = make(kind), Ball()
    before, _ = difference(field, source)
    fit_field(field, source, STEP, seed=0)
    opacity, colour = difference(field, source)
    assert opacity < 0.01 < before
    assert colour < 0.05
    assert all(parameter.grad is None for parameter in field.parameters())


def test_of_nothing_nothing_is_made() -> None:
    field, source = make("grid"), Ball(density=0.0)
    fit_field(field, source, STEP, seed=0)
    with torch.no_grad():
        assert float(-torch.expm1(-field(torch.rand(999, 3) * 2 - 1).density * STEP).max()) < 0.05


def test_a_box_that_is_no_cube() -> None:
    box = (-1.0, -0.5, -1.0, 1.0, 0.5, 2.0)
    source = Ball(aabb=box)
    field = HashGridField(SMALL_FIELD, box, torch.Generator().manual_seed(0))
    fit_field(field, source, STEP, seed=0)
    inside = torch.tensor([Ball.CENTRE, (0.2, 0.2, -0.1), (0.2, -0.2, 0.1)])
    outside = torch.tensor([(0.9, 0.0, 0.5), (-0.5, 0.2, 0.5), (0.0, 0.0, 1.0)])
    with torch.no_grad():
        assert float(field(inside).density.min()) * STEP > 1
        assert float(field(outside).density.max()) * STEP < 0.1


def test_reproducible() -> None:
    fields = [make("grid") for _ in range(3)]
    for field, seed in zip(fields, (1, 1, 2), strict=True):
        fit_field(field, Ball(), STEP, seed, steps=4)
    first, same, other = (list(field.parameters()) for field in fields)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["grid", "planes"])
def test_on_a_gpu(kind: str) -> None:
    field, source = make(kind).cuda(), Ball().cuda()
    fit_field(field, source, STEP, seed=0)
    opacity, colour = difference(field, source)
    assert opacity < 0.01
    assert colour < 0.05
