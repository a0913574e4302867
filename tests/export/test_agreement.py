"""How far a mesh and the render of its field agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from shapes import (
    BOX,
    HARD,
    agreement_with,
    ball,
    extract,
    grey,
    one_colour,
    renderer_of,
    smaller_pictures,
    sphere,
    together,
)

from dreamfusion_fast.export import agreement as measured
from dreamfusion_fast.export.agreement import SIZE, Agreement, measure_agreement
from dreamfusion_fast.export.views import one, rings

pytestmark = pytest.mark.usefixtures("quick")

LEFT, RIGHT, RADIUS = (-0.45, 0.1, 0.0), (0.5, -0.1, 0.1), 0.3


def two_balls(positions):
    return ball(LEFT, RADIUS, HARD, 1000.0)(positions) + ball(RIGHT, RADIUS, HARD, 1000.0)(positions)


@pytest.fixture(scope="module")
def both_agree():
    with smaller_pictures():
        return agreement_with(two_balls, together(sphere(LEFT, RADIUS), sphere(RIGHT, RADIUS)), 48)


def hit(rays, center):
    to_center = torch.tensor(center) - rays.origins
    return torch.linalg.cross(to_center, rays.directions).norm(dim=1) < RADIUS


def test_mesh_of_the_field_itself_is_near_one(both_agree):
    assert both_agree.iou > 0.96
    assert both_agree.covered > 0.97
    assert both_agree.color < 0.005
    extracted = agreement_with(two_balls, extract(two_balls, BOX, resolution=64), 64)
    assert extracted.iou > 0.92
    assert extracted.covered > 0.98


def test_missing_part_lowers_both_shares_by_what_it_shows(both_agree):
    cameras = rings(measured.VIEWS, torch.zeros(3), 1.0)
    share = []
    for view in range(len(cameras)):
        rays = one(cameras, view).rays(SIZE, SIZE)
        left, right = hit(rays, LEFT), hit(rays, RIGHT)
        share.append(float(left.sum() / (left | right).sum()))
    found = agreement_with(two_balls, sphere(LEFT, RADIUS), 48)
    assert 0.4 < np.mean(share) < 0.6
    assert found.covered == pytest.approx(np.mean(share) * both_agree.covered, abs=0.005)
    assert found.iou == pytest.approx(np.mean(share) * both_agree.iou, abs=0.01)
    assert found.color == pytest.approx(both_agree.color, abs=0.005)


def test_too_thick_a_mesh_covers_all_and_lowers_the_ratio():
    agreement = agreement_with(ball((0.0, 0.0, 0.0), 0.4, HARD, 1000.0), sphere((0, 0, 0), 0.5), 32)
    assert agreement.covered == 1
    assert agreement.iou == pytest.approx(0.4**2 / 0.5**2, abs=0.03)


def test_other_colours_change_the_colour_only():
    field, mesh = grey(ball((0.0, 0.0, 0.0), 0.4)), one_colour(sphere((0, 0, 0), 0.4))
    renderer = renderer_of(field, 32)
    found = [
        measure_agreement(renderer, mesh, np.array([[color]], np.uint8))
        for color in ((128, 128, 128), (255, 0, 255), (128, 128, 255))
    ]
    assert len({(agreement.iou, agreement.covered) for agreement in found}) == 1
    np.testing.assert_allclose([agreement.color for agreement in found], [0, 0.5, 1 / 6], atol=0.005)


def test_mesh_somewhere_else_agrees_in_nothing():
    found = agreement_with(ball((0.5, 0.0, 0.0), 0.1), sphere((0, -0.6, 0), 0.1), 32)
    assert found.iou < 0.05
    nothing = agreement_with(lambda positions: torch.zeros(len(positions)), sphere((0, 0, 0), 0.1), 8)
    assert (nothing.iou, nothing.covered, nothing.color) == (0, 1, 1)


def test_says_what_was_measured():
    text = str(Agreement(0.876, 0.912, 0.034))
    assert text == "mesh agrees with the render: 0.88 (covers 0.91 of it, colours differ by 0.03)"


@pytest.mark.parametrize("iou", [Agreement.LOW, 0.95, 1.0])
def test_no_warning_where_it_agrees(iou):
    assert Agreement(iou, 0.5, 1.0).warning is None


def test_warning_is_a_line_that_says_what_to_try():
    warning = Agreement(0.85, 1.0, 0.0).warning
    assert warning is not None
    assert "\n" not in warning
    assert warning.startswith("warning: mesh and render agree only to 0.85, below 0.9")
    for advice in ("more steps", "another seed", "--export.resolution 256"):
        assert advice in warning
