"""Thin parts at the default settings: they survive, whole, as thick as they are seen, alone or on a body."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from shapes import (
    BOX,
    HARD,
    SOFT_DEPTH,
    THICKNESS,
    agreement_with,
    as_trimesh,
    ball,
    contains,
    extract,
    hard,
    soft,
    to_ring,
    to_segment,
    to_square,
)

VOXEL = 2 / 128
LEVEL, SLANTED = ([-0.8, -0.5, 0.0], [0.8, -0.5, 0.0]), ([-0.4, -0.2, -0.3], [0.4, 0.6, 0.3])
RODS = {"level": lambda p: to_segment(p, *LEVEL), "slanted": lambda p: to_segment(p, *SLANTED)}
RING = {"ring": lambda p: to_ring(p, 0.1, 0.7)}
PLATES = {
    "level plate": lambda p: to_square(p, [0.0, -0.8, 0.0], 0.25),
    "slanted plate": lambda p: to_square(p, [0.0, 0.8, 0.1], 0.25, 30.0),
}
PARTS = RODS | RING | PLATES
# Half the thickness that is seen: a soft rod is opaque where it absorbs half of the light, a soft plate begins where it
# has absorbed 6 %, which is 1.96 widths from the middle.
SEEN = {hard: dict.fromkeys(PARTS, 0.5 * THICKNESS)}
SEEN[soft] = dict.fromkeys(PARTS, 0.5 * THICKNESS * np.sqrt(2 * np.log(SOFT_DEPTH / np.log(2))))
SEEN[soft] |= dict.fromkeys(PLATES, 0.5 * THICKNESS * 1.96)


def nearest(parts, positions):
    return torch.stack([distance(positions) for distance in parts.values()]).amin(dim=0)


def along(start, end, count=40):
    return np.linspace(start, end, count)


@pytest.fixture(scope="module", params=[hard, soft], ids=["hard", "soft"])
def thin(request):
    """Two rods, a ring of wire and two plates, each 2 % of the box thick and none touching another."""
    kind = request.param

    def density(positions):
        return kind(nearest(PARTS, positions))

    return kind, density, extract(density, BOX)


@pytest.mark.quick(1)
def test_thin_parts_keep_their_thickness(thin):
    kind, _, mesh = thin
    solid = as_trimesh(mesh)
    assert solid.is_watertight
    assert solid.body_count == len(PARTS)
    points = torch.tensor(solid.sample(20_000, seed=0), dtype=torch.float32)
    distances = torch.stack([distance(points) for distance in PARTS.values()])
    for part, name in enumerate(PARTS):
        own = distances[part][distances.argmin(dim=0) == part]
        assert len(own) > 500
        expected = SEEN[kind][name]
        assert own.mean() == pytest.approx(expected, abs=0.6 * VOXEL)
        assert own.quantile(0.01) > expected - 1.2 * VOXEL
        assert own.quantile(0.99) < expected + 1.2 * VOXEL


@pytest.mark.quick(1)
def test_thin_parts_are_whole(thin):
    _, _, mesh = thin
    turn = np.linspace(0, 2 * np.pi, 60)
    grid = np.stack(np.meshgrid(np.linspace(-0.24, 0.24, 5), [-0.8], np.linspace(-0.24, 0.24, 5)), -1)
    middles = [along(*LEVEL), along(*SLANTED), grid.reshape(-1, 3)]
    middles.append(np.stack([0.7 * np.sin(turn), np.full(60, 0.1), 0.7 * np.cos(turn)], -1))
    assert contains(mesh, np.concatenate(middles)).all()


@pytest.mark.quick(1)
def test_thin_parts_agree_with_the_render(thin):
    kind, density, mesh = thin
    agreement = agreement_with(density, mesh)
    assert agreement.iou > 0.91
    assert agreement.covered > {hard: 0.98, soft: 0.935}[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [hard, soft])
def test_thin_parts_of_a_body_survive(kind):
    up, aside = ([0.0, -0.2, 0.0], [0.0, 0.7, 0.0]), ([0.0, -0.3, 0.0], [0.7, 0.2, 0.4])
    parts = {
        "up": lambda p: to_segment(p, *up),
        "aside": lambda p: to_segment(p, *aside),
        "plate": lambda p: to_square(p, [-0.35, -0.3, 0.0], 0.25),
    }
    body = ball((0.0, -0.3, 0.0), 0.2, HARD, 1000.0)

    def density(positions):
        return torch.maximum(body(positions), kind(nearest(parts, positions)))

    mesh = extract(density, BOX)
    assert as_trimesh(mesh).body_count == 1
    plate = [[x, -0.3, z] for x in (-0.55, -0.4, -0.25) for z in (-0.2, 0.0, 0.2)]
    assert contains(mesh, np.concatenate([along(*up), along(*aside), plate])).all()
    agreement = agreement_with(density, mesh)
    assert agreement.iou > 0.92
    assert agreement.covered > {hard: 0.99, soft: 0.965}[kind]
