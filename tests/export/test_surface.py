"""Surfaces of analytic densities: where they lie, and that nothing floats."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from shapes import BOX, as_trimesh, ball, contains, extract, sphere, together

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.export.density import sample_density
from dreamfusion_fast.export.mesh import Mesh
from dreamfusion_fast.export.surface import keep_visible

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize(
    ("threshold", "smooth_iterations", "target_faces"), [(50.0, 0, 0), (50.0, 5, 0), (50.0, 5, 2000), (None, 5, 2000)]
)
def test_sphere_has_its_radius_and_faces_outward(threshold, smooth_iterations, target_faces):
    center, radius, resolution = (0.1, -0.2, 0.05), 0.6, 48
    mesh = extract(
        ball(center, radius, sharpness=80.0 if threshold else 1000.0),
        BOX,
        resolution=resolution,
        threshold=threshold,
        smooth_iterations=smooth_iterations,
        target_faces=target_faces,
    )
    outward = mesh.vertices - np.array(center)
    distance = np.linalg.norm(outward, axis=1)
    voxel = 2 / resolution
    largest = voxel / 4 if smooth_iterations == 0 and threshold else voxel
    assert np.abs(distance - radius).max() < largest
    cosine = np.einsum("ij,ij->i", mesh.vertex_normals(), outward / distance[:, None])
    assert cosine.min() > (0.9 if threshold else 0.8)
    solid = as_trimesh(mesh)
    assert solid.is_watertight
    assert solid.is_winding_consistent
    assert solid.volume == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.03 if threshold else 0.08)
    if target_faces:
        assert len(mesh.faces) <= target_faces


@pytest.mark.parametrize("threshold", [None, 10.0])
def test_surface_closes_at_the_box(threshold):
    def slab(positions):
        return 1000.0 * (positions[:, 1].abs() < 0.33).float()

    mesh = extract(slab, BOX, resolution=20, threshold=threshold, smooth_iterations=0, target_faces=0)
    solid = as_trimesh(mesh)
    assert solid.is_watertight
    np.testing.assert_allclose(solid.bounds[:, [0, 2]], [[-1, -1], [1, 1]], atol=1e-6 if threshold else 1e-3)
    assert solid.volume == pytest.approx(4 * 0.7, rel=1e-3 if threshold else 0.1)


def test_box_that_is_no_cube_and_chunks_that_do_not_divide():
    box = torch.tensor([-1.0, -0.5, 0.0, 1.0, 0.5, 0.7])
    calls = []

    def density(positions):
        calls.append(len(positions))
        return positions[:, 0] + 10 * positions[:, 1] + 100 * positions[:, 2]

    grid = sample_density(density, box, resolution=20, chunk=113)
    values, low, voxel = grid.values, grid.low, grid.voxel
    assert values.shape == (21, 11, 8)
    assert max(calls) == 113
    assert sum(calls) == values.size
    x, y, z = (low[i] + voxel * np.arange(values.shape[i]) for i in range(3))
    expected = x[:, None, None] + 10 * y[None, :, None] + 100 * z
    np.testing.assert_allclose(values, expected, atol=1e-4)
    assert low[2] <= 0
    assert z[-1] >= 0.7 - 1e-6


@pytest.mark.parametrize(("min_component", "pieces"), [(0.0, 2), (0.01, 2), (0.1, 1)])
def test_floaters_are_dropped_by_size(min_component, pieces):
    large, small = ball((-0.2, 0.0, 0.0), 0.5), ball((0.8, 0.8, 0.8), 0.12)
    mesh = extract(
        lambda positions: large(positions) + small(positions),
        BOX,
        resolution=40,
        threshold=50.0,
        min_component=min_component,
    )
    assert as_trimesh(mesh).body_count == pieces
    assert (mesh.vertices.max() > 0.7) == (pieces == 2)


def test_walls_of_cavities_are_dropped():
    def shell(positions):
        distance = positions.norm(dim=-1)
        return 100.0 * ((distance < 0.7) & (distance > 0.4)).float()

    mesh = extract(shell, BOX, resolution=32, threshold=10.0, smooth_iterations=0, target_faces=0)
    assert as_trimesh(mesh).body_count == 1
    assert np.linalg.norm(mesh.vertices, axis=1).min() > 0.6


@pytest.mark.parametrize("threshold", [None, 10.0])
def test_ball_in_a_hollow_shell_is_dropped(threshold):
    def density(positions):
        distance = positions.norm(dim=-1)
        return 200.0 * ((distance < 0.2) | ((distance > 0.5) & (distance < 0.7))).float()

    mesh = extract(density, BOX, resolution=32, threshold=threshold, min_component=0.0)
    assert as_trimesh(mesh).body_count == 1
    assert np.linalg.norm(mesh.vertices, axis=1).min() > 0.6


def test_pieces_that_show_anywhere_are_kept():
    outer, inner, peeping = sphere((0, 0, 0), 0.6), sphere((0, 0, 0), 0.3), sphere((0.55, 0, 0), 0.2)
    kept = keep_visible(together(inner, outer, peeping))
    np.testing.assert_array_equal(kept.corners, together(outer, peeping).corners)
    assert keep_visible(outer) is outer
    nothing = Mesh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int64))
    assert len(keep_visible(nothing).faces) == 0


def test_faint_blob_beside_a_body_gives_no_piece():
    body = ball((-0.3, 0.0, 0.0), 0.4)

    def density(positions):
        blob = (positions - torch.tensor([0.65, 0.0, 0.0])).norm(dim=-1) < 0.2
        return body(positions) + 1.6 * blob  # absorbs 47 % at most

    mesh = extract(density, BOX, resolution=40, min_component=0.0)
    assert as_trimesh(mesh).body_count == 1
    assert mesh.vertices[:, 0].max() < 0.2


@pytest.mark.parametrize("haze", [0.05, 0.15])
def test_haze_does_not_become_the_surface(haze):
    solid = ball((0.0, 0.0, 0.0), 0.4)
    mesh = extract(lambda positions: solid(positions) + haze, BOX, resolution=40)
    assert np.linalg.norm(mesh.vertices, axis=1).max() < 0.5


def test_inside_of_a_cup_is_open():
    def cup(positions):
        radius, height = positions[:, [0, 2]].norm(dim=1), positions[:, 1]
        return 300.0 * ((radius < 0.5) & (height.abs() < 0.4) & ((radius > 0.38) | (height < -0.28))).float()

    mesh = extract(cup, BOX, resolution=48)
    heights = np.arange(-0.2, 0.5, 0.1)
    middle = np.stack([0 * heights, heights, 0 * heights], -1)
    assert not contains(mesh, middle).any()
    assert not contains(mesh, middle + np.array([0.3, 0, 0])).any()
    assert contains(mesh, [[0, -0.34, 0], [0.44, 0, 0], [0, 0.3, -0.44]]).all()
    walls = np.pi * (0.5**2 * 0.8 - 0.38**2 * 0.68)
    assert as_trimesh(mesh).volume == pytest.approx(walls, rel=0.2)


@pytest.mark.parametrize("threshold", [None, 50.0])
def test_same_field_gives_the_same_mesh(threshold):
    first, second = (
        extract(ball((0.1, 0.0, 0.0), 0.5), BOX, resolution=24, threshold=threshold, target_faces=500) for _ in range(2)
    )
    assert first.vertices.tobytes() == second.vertices.tobytes()
    assert first.faces.tobytes() == second.faces.tobytes()


def test_empty_fields_say_what_to_try():
    with pytest.raises(UserError, match=r"never exceeds the threshold 200 .*100.*--threshold, such as 50"):
        extract(lambda positions: torch.full((len(positions),), 100.0), BOX, resolution=8, threshold=200.0)
    with pytest.raises(UserError, match=r"nowhere opaque .*0\.05.*--threshold, such as 0\.025"):
        extract(lambda positions: torch.full((len(positions),), 0.05), BOX, resolution=8)
    with pytest.raises(UserError, match=r"nowhere opaque \(its largest density is 0\); train longer$"):
        extract(lambda positions: torch.zeros(len(positions)), BOX, resolution=8)


@pytest.mark.parametrize("threshold", [None, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_density_that_is_not_finite_says_what_to_try(value, threshold):
    with pytest.raises(UserError, match=r"not finite.*earlier checkpoint"):
        extract(lambda positions: torch.full((len(positions),), value), BOX, resolution=8, threshold=threshold)


def test_what_is_thinner_than_a_cell_says_what_to_try():
    def film(positions):
        return 8.0 * (positions[:, 1].abs() < 0.01)

    with pytest.raises(UserError, match="thinner than a cell; export with a higher --resolution"):
        extract(film, BOX, resolution=32)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="aabb has to have shape"):
        sample_density(torch.zeros_like, torch.zeros(2, 3), 8)
    with pytest.raises(ValueError, match="lower corner first"):
        sample_density(torch.zeros_like, -BOX, 8)
    with pytest.raises(ValueError, match="resolution has to be at least 2"):
        sample_density(torch.zeros_like, BOX, 1)
