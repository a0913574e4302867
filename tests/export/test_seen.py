"""The surface that agrees with what the renders show."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from shapes import BOX, HARD, ball, hard, lumpy, soft, to_segment

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.export.density import sample_density
from dreamfusion_fast.export.seen import seen_distance

pytestmark = pytest.mark.usefixtures("quick")

OBLONG = torch.tensor([-1.0, -0.5, -0.3, 1.0, 0.5, 0.7])


def points_of(grid):
    axes = [grid.low[axis] + grid.voxel * np.arange(grid.values.shape[axis]) for axis in range(3)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1)


@pytest.mark.parametrize("box", [BOX, OBLONG])
def test_distance_to_a_hard_ball(box):
    center, radius = (0.2, 0.05, 0.2), 0.4
    grid = sample_density(ball(center, radius, HARD, 1000.0), box, 48)
    found, voxel = seen_distance(grid), grid.voxel
    expected = radius - np.linalg.norm(points_of(grid) - center, axis=-1)
    assert found.shape == grid.values.shape
    assert found.dtype == np.float32
    assert (found[expected > voxel] > 0).all()
    assert (found[expected < -voxel] < 0).all()
    near = np.abs(expected) < voxel
    assert np.abs(found - expected)[near].max() < 1.25 * voxel
    assert np.abs((found - expected)[near].mean()) < 0.5 * voxel
    assert found.min() == pytest.approx(-2 * voxel)


def test_soft_surface_is_where_the_render_begins_to_be_opaque():
    def density(positions):
        return 30 * torch.exp(-0.5 * (positions.norm(dim=-1) / 0.25) ** 2)

    grid = sample_density(density, BOX, 48)
    found, radius = seen_distance(grid), np.linalg.norm(points_of(grid), axis=-1)
    # Rays that pass at this distance absorb half of the light.
    outline = 0.25 * np.sqrt(2 * np.log(30 * 0.25 * np.sqrt(2 * np.pi) / np.log(2)))
    assert (found[radius > outline + grid.voxel] < 0).all()
    assert (found[radius < outline - 2 * grid.voxel] > 0).all()


@pytest.mark.parametrize("kind", [hard, soft])
def test_rod_of_a_few_points_is_inside(kind):
    grid = sample_density(lambda p: kind(to_segment(p, [-0.5, -0.4, -0.3], [0.5, 0.6, 0.4])), BOX, 96)
    found = seen_distance(grid)
    apart = to_segment(torch.from_numpy(points_of(grid)).float().view(-1, 3), [-0.5, -0.4, -0.3], [0.5, 0.6, 0.4])
    apart = apart.view(found.shape).numpy()
    assert (found[apart < 0.008] > 0).all()
    assert (found[apart > 0.055] < 0).all()


def test_densities_below_zero_are_empty():
    grid = sample_density(ball((0.0, 0.0, 0.0), 0.4, HARD), BOX, 24)
    below, zero = (np.where(grid.values < 1e-6, np.float32(least), grid.values) for least in (-5, 0))
    expected = seen_distance(replace(grid, values=zero))
    np.testing.assert_array_equal(seen_distance(replace(grid, values=below)), expected)


@pytest.mark.parametrize("peak", [0.0, 0.05])
def test_nowhere_opaque_says_what_to_try(peak):
    grid = sample_density(lambda positions: torch.full((len(positions),), peak), BOX, 8)
    advice = "export with a --threshold, .*train longer" if peak else "train longer$"
    with pytest.raises(UserError, match=rf"nowhere opaque .*{peak:.4g}\); {advice}"):
        seen_distance(grid)


@pytest.mark.parametrize(("box", "resolution"), [(BOX, 8), (BOX, 41), (OBLONG, 100)])
def test_occupied_space_misses_nothing_that_absorbs_light(box, resolution):
    rng = np.random.default_rng(0)
    grid = sample_density(lambda positions: torch.zeros(len(positions)), box, resolution)
    density, low, voxel = grid.values, grid.low, grid.voxel
    points = np.stack([rng.integers(0, n, 12) for n in density.shape], -1)
    density[tuple(points.T)] = 100.0
    space = grid.occupancy
    size = voxel * (np.array(density.shape) - 1)
    # Around a point, what is interpolated is above zero up to its neighbours.
    around = points[:, None] + rng.uniform(-0.99, 0.99, (12, 200, 3))
    share = (around * voxel / size).reshape(-1, 3)
    cells = np.floor(share[((share >= 0) & (share < 1)).all(1)] * 64).astype(int)
    occupied = space.occupied().numpy()
    assert occupied[tuple(cells.T)].all()
    if resolution > 8:
        assert occupied.mean() < 0.1
    torch.testing.assert_close(space.aabb, torch.tensor([*low, *(low + size)], dtype=torch.float32))


@pytest.mark.gpu
def test_gpu_agrees_with_the_cpu():
    grid = sample_density(lumpy, BOX, 48)
    there = replace(grid, device="cuda")
    on_cpu, on_gpu = seen_distance(grid), seen_distance(there)
    difference = np.abs(on_gpu - on_cpu)
    # A pixel at the very edge may be opaque for one of them only, and moves the surface there by its width.
    assert (difference < 1e-4).mean() > 0.99
    assert difference.max() < 0.5 * grid.voxel
    assert ((on_gpu > 0) == (on_cpu > 0)).mean() > 0.9995
    assert torch.equal(there.occupancy.bitfield.cpu(), grid.occupancy.bitfield)
