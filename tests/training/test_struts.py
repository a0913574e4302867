"""Rods between torn pieces: where they are, how thick, and that the last stage fills them."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch
from fakes import BallGuidance, small_config

from dreamfusion_fast.export.density import DensityGrid, sample_density
from dreamfusion_fast.fields import query_density
from dreamfusion_fast.rendering.orbits import orbit_cameras
from dreamfusion_fast.training.sections import FirmConfig
from dreamfusion_fast.training.struts import Struts, find_struts
from dreamfusion_fast.training.trainer import Trainer

LOW, SIDE = np.array([-1.0, -1.0, -1.0]), 64
VOXEL = 2 / SIDE


def balls(*parts):
    """A dense grid of balls (centre, radius), scene units."""
    axis = np.linspace(-1, 1, SIDE + 1)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1)
    inside = [np.linalg.norm(points - np.array(centre), axis=-1) < radius for centre, radius in parts]
    return (40.0 * np.any(inside, axis=0)).astype(np.float32) if parts else np.zeros(points.shape[:3], np.float32)


def find(density, longest=0.2):
    return find_struts(DensityGrid(density, LOW, VOXEL), longest)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_two_balls_are_joined_along_the_line_between_them(axis):
    one, other = np.zeros(3), np.zeros(3)
    one[axis], other[axis] = -0.4, 0.5
    struts = find(balls((one, 0.3), (other, 0.25)))
    assert len(struts) == 1
    ends = torch.cat([struts.start, struts.end]).numpy()
    ends = ends[ends[:, axis].argsort()]
    expected = np.zeros((2, 3))
    expected[:, axis] = -0.1, 0.25
    np.testing.assert_allclose(ends, expected, atol=2.5 * VOXEL)  # the rod ends inside
    assert struts.radius.dtype == torch.float32
    assert 1.25 / 64 <= float(struts.radius) <= 3.0 / 64


def test_thin_ends_get_a_thin_rod():
    thick = find(balls(((-0.4, 0, 0), 0.3), ((0.4, 0, 0), 0.3)))
    thin = find(balls(((-0.4, 0, 0), 0.3), ((0.2, 0, 0), 0.06)))
    assert float(thin.radius) < float(thick.radius)


@pytest.mark.parametrize(
    "parts",
    [
        (),
        [((0, 0, 0), 0.5)],
        [((0, 0, 0), 0.3), ((0.29, 0, 0), 0.3)],  # they touch
        [((-0.6, 0, 0), 0.3), ((0.6, 0, 0), 0.2)],  # 0.35 of the box apart
        [((-0.3, 0, 0), 0.5), ((0.4, 0, 0), 0.05)],  # a thousandth of the volume: the export drops it
    ],
    ids=["nothing", "one", "touching", "far", "dust"],
)
def test_nothing_to_join(parts):
    assert find(balls(*parts)) is None


def test_a_chain_is_joined_link_by_link_as_far_as_it_reaches():
    links = [((x, 0.0, 0.0), 0.12) for x in (-0.75, -0.35, 0.05, 0.75)]
    struts = find(balls(*links), longest=0.1)
    assert len(struts) == 2
    lengths = (struts.end - struts.start).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((2,), 0.16), atol=3 * VOXEL, rtol=0)


def test_a_box_that_is_no_cube():
    density = balls(((-0.4, 0, 0), 0.3), ((0.5, 0, 0), 0.25))[:, 15:49, 20:45]
    low = LOW + VOXEL * np.array([0, 15, 20])
    ends = find_struts(DensityGrid(density, low, VOXEL), 0.2)
    whole = find(balls(((-0.4, 0, 0), 0.3), ((0.5, 0, 0), 0.25)))
    torch.testing.assert_close(ends.start, whole.start)
    torch.testing.assert_close(ends.end, whole.end)


def two_rods():
    return Struts(
        torch.tensor([[-0.3, 0.1, 0.0], [0.2, -0.4, 0.3]]),
        torch.tensor([[0.4, 0.2, 0.1], [0.2, 0.3, 0.1]]),
        torch.tensor([0.1, 0.05]),
    )


def to_axes(struts, points):
    """Distances `[n, k]` of points to the axes, and how far along those the closest places are, in float64."""
    start, along = struts.start.double(), (struts.end - struts.start).double()
    offset = points.double()[:, None] - start
    share = ((offset * along).sum(-1) / along.square().sum(-1)).clamp(0, 1)
    return (offset - share[..., None] * along).norm(dim=-1), share


def test_points_are_inside_and_everywhere():
    struts = two_rods()
    points, radius = struts.points(4001, torch.Generator().manual_seed(0))
    distance, share = to_axes(struts, points)
    rod = (radius == 0.05).long()
    distance, share = (x.gather(1, rod[:, None])[:, 0] for x in (distance, share))
    assert (distance <= radius + 1e-6).all()
    assert float(distance.max()) > 0.095
    counts = torch.histc(share[rod == 0], 10, 0, 1)
    assert float(counts.min()) > 100


def test_rays_that_pass_through():
    struts = two_rods()
    rays = orbit_cameras(2, 20.0).rays(48, 48)
    rod, share = struts.hit(rays)
    t = torch.linspace(0, 6, 1200)
    points = rays.origins[:, None] + t[:, None] * rays.directions[:, None]
    distance, along = to_axes(struts, points.view(-1, 3))
    within = (distance - struts.radius).view(len(rays.origins), -1, 2)
    nearest = within.amin(dim=1)
    clear = nearest.abs().amin(dim=1) > 2e-3  # a ray's samples miss the closest place by a little
    assert torch.equal((rod >= 0)[clear], (nearest.amin(dim=1) < 0)[clear])
    both = (nearest < 0).all(dim=1)
    hit = clear & (rod >= 0) & ~both
    assert int(hit.sum()) > 100
    assert torch.equal(rod[hit], nearest.argmin(dim=1)[hit])
    at = within.argmin(dim=1).gather(1, rod.clamp(min=0)[:, None])
    expected = along.view(len(rays.origins), -1, 2)[torch.arange(len(rod)), at[:, 0], rod.clamp(min=0)]
    torch.testing.assert_close(share[hit].double(), expected[hit], atol=0.02, rtol=0)
    assert (rod >= 0).sum() < 0.3 * len(rod)


def torn(join):
    """A trainer whose field holds two balls with a gap of a tenth of the box between them."""
    firm = FirmConfig(steps=120, lr_table=0.03, lr_mlp=0.01, join=join)
    trainer = Trainer(small_config(firm=firm), torch.device("cpu"), BallGuidance())
    field = trainer.scene.field
    optimizer = torch.optim.Adam(field.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        points = torch.rand(4096, 3, generator=generator) * 2 - 1
        middle = torch.tensor([[-0.4, 0.0, 0.0], [0.45, 0.0, 0.0]])
        inside = ((points[:, None] - middle).norm(dim=-1) < torch.tensor([0.3, 0.3])).any(dim=1)
        output = field(points)
        density, albedo = output.density, output.color
        wanted = torch.stack([inside * 0.6 + 0.2, inside * 0.1 + 0.1, inside * 0.1 + 0.1], dim=1)
        loss = (torch.log1p(density) - 3.7 * inside).square().mean() + (albedo - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trainer.scene.occupancy.update(field, 0)
    return trainer


def pieces(trainer):
    grid = sample_density(lambda x: query_density(trainer.scene.field, x), trainer.scene.field.aabb, 64)
    label, count = scipy.ndimage.label(grid.values > 10)
    volume = np.bincount(label.ravel())[1:]
    return int((volume > 0.005 * volume.max()).sum()) if count else 0


@pytest.mark.slow
@pytest.mark.parametrize(("join", "expected"), [(0.15, 1), (0.0, 2), (0.05, 2)])
def test_the_last_stage_joins_what_is_torn(join, expected):
    trainer = torn(join)
    assert pieces(trainer) == 2
    assert trainer.firm()
    assert pieces(trainer) == expected
    if expected == 1:
        with torch.no_grad():
            output = trainer.scene.renderer.render(orbit_cameras(1, 0.0).rays(33, 33))
        assert float(output.opacity.view(33, 33)[16, 16]) > 0.5


@pytest.mark.parametrize("join", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(join):
    with pytest.raises(ValueError, match=r"join: got .*, want (0 to 1|a finite number)"):
        FirmConfig(join=join)
