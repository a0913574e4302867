"""Surfaces of analytic densities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import trimesh

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.export.mesh import (
    Mesh,
    automatic_threshold,
    decimate,
    extract_mesh,
    keep_large_components,
    sample_density,
    smooth,
)

BOX = torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0, 1.0])


def ball(center, radius, peak=100.0, sharpness=80.0):
    center = torch.tensor(center)
    return lambda positions: peak * torch.sigmoid(sharpness * (radius - (positions - center).norm(dim=-1)))


def as_trimesh(mesh: Mesh) -> trimesh.Trimesh:
    return trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)


@pytest.mark.parametrize(("smooth_iterations", "target_faces"), [(0, 0), (5, 0), (5, 2000)])
def test_sphere_has_its_radius_and_faces_outward(smooth_iterations, target_faces):
    center, radius, resolution = (0.1, -0.2, 0.05), 0.6, 48
    mesh = extract_mesh(
        ball(center, radius),
        BOX,
        resolution=resolution,
        threshold=50.0,
        smooth_iterations=smooth_iterations,
        target_faces=target_faces,
    )
    outward = mesh.vertices - np.array(center)
    distance = np.linalg.norm(outward, axis=1)
    voxel = 2 / resolution
    assert np.abs(distance - radius).max() < (voxel / 4 if smooth_iterations == 0 else voxel)
    assert (np.einsum("ij,ij->i", mesh.vertex_normals(), outward / distance[:, None]) > 0.9).all()
    solid = as_trimesh(mesh)
    assert solid.is_watertight
    assert solid.is_winding_consistent
    assert solid.volume == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.03)
    if target_faces:
        assert len(mesh.faces) <= target_faces


def test_normals_are_unit_and_of_float32():
    mesh = extract_mesh(ball((0.0, 0.0, 0.0), 0.5), BOX, resolution=16, threshold=50.0)
    normals = mesh.vertex_normals()
    assert normals.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-5)


def test_surface_closes_at_the_box():
    def slab(positions):
        return 1000.0 * (positions[:, 1].abs() < 0.33).float()

    mesh = extract_mesh(slab, BOX, resolution=20, threshold=10.0, smooth_iterations=0, target_faces=0)
    solid = as_trimesh(mesh)
    assert solid.is_watertight
    np.testing.assert_allclose(solid.bounds[:, [0, 2]], [[-1, -1], [1, 1]], atol=1e-6)
    assert solid.volume == pytest.approx(4 * 0.7, rel=1e-3)


def test_box_that_is_no_cube_and_chunks_that_do_not_divide():
    box = torch.tensor([-1.0, -0.5, 0.0, 1.0, 0.5, 0.7])
    calls = []

    def density(positions):
        calls.append(len(positions))
        return positions[:, 0] + 10 * positions[:, 1] + 100 * positions[:, 2]

    low, voxel, values = sample_density(density, box, resolution=20, chunk=113)
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
    mesh = extract_mesh(
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

    mesh = extract_mesh(shell, BOX, resolution=32, threshold=10.0, smooth_iterations=0, target_faces=0)
    assert as_trimesh(mesh).body_count == 1
    assert np.linalg.norm(mesh.vertices, axis=1).min() > 0.6


def test_automatic_threshold_puts_a_hard_surface_where_it_is():
    def hard(positions):
        return 200.0 * (positions.norm(dim=-1) < 0.5).float()

    mesh = extract_mesh(hard, BOX, resolution=40, smooth_iterations=0)
    assert np.abs(np.linalg.norm(mesh.vertices, axis=1) - 0.5).max() < 2 / 40


def test_automatic_threshold_puts_a_soft_surface_where_it_begins_to_be_seen():
    def soft(positions):
        return 30 * torch.exp(-0.5 * (positions.norm(dim=-1) / 0.25) ** 2)

    _low, voxel, density = sample_density(soft, BOX, 64)
    threshold = automatic_threshold(density, voxel)
    radius = 0.25 * np.sqrt(2 * np.log(30 / threshold))
    seen = -np.log(1 - 0.15)
    # Along the axis, where does the optical depth reach that?
    x = np.linspace(1, 0, 10_001)
    depth = np.cumsum(30 * np.exp(-0.5 * (x / 0.25) ** 2)) * 1e-4
    absorbed = x[np.searchsorted(depth, seen)]
    outline = 0.25 * np.sqrt(2 * np.log(30 * 0.25 * np.sqrt(2 * np.pi) / seen))
    assert absorbed - voxel < radius < outline + voxel


def test_haze_does_not_become_the_surface():
    solid = ball((0.0, 0.0, 0.0), 0.4)
    mesh = extract_mesh(lambda positions: solid(positions) + 0.1, BOX, resolution=40)
    assert np.linalg.norm(mesh.vertices, axis=1).max() < 0.5


def test_empty_fields_say_what_to_try():
    with pytest.raises(UserError, match=r"never exceeds the threshold 200 .*100.*lower --threshold, such as 50"):
        extract_mesh(lambda positions: torch.full((len(positions),), 100.0), BOX, resolution=8, threshold=200.0)
    with pytest.raises(UserError, match=r"nowhere opaque .*0\.05.*--threshold, such as 0\.025"):
        extract_mesh(lambda positions: torch.full((len(positions),), 0.05), BOX, resolution=8)
    with pytest.raises(UserError, match="nowhere opaque"):
        extract_mesh(lambda positions: torch.zeros(len(positions)), BOX, resolution=8)
    with pytest.raises(UserError, match="not finite"):
        extract_mesh(lambda positions: torch.full((len(positions),), torch.nan), BOX, resolution=8, threshold=1.0)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="aabb has to have shape"):
        sample_density(torch.zeros_like, torch.zeros(2, 3), 8)
    with pytest.raises(ValueError, match="lower corner first"):
        sample_density(torch.zeros_like, -BOX, 8)
    with pytest.raises(ValueError, match="resolution has to be at least 2"):
        sample_density(torch.zeros_like, BOX, 1)


def test_parts_keep_the_orientation():
    mesh = extract_mesh(
        ball((0.0, 0.0, 0.0), 0.5), BOX, resolution=24, threshold=50.0, smooth_iterations=0, target_faces=0
    )
    for changed in (smooth(mesh, 3), decimate(mesh, 500), keep_large_components(mesh, 0.5)):
        assert as_trimesh(changed).volume == pytest.approx(as_trimesh(mesh).volume, rel=0.05)


def test_same_field_gives_the_same_mesh():
    first, second = (extract_mesh(ball((0.1, 0.0, 0.0), 0.5), BOX, resolution=24, target_faces=500) for _ in range(2))
    np.testing.assert_array_equal(first.vertices, second.vertices)
    np.testing.assert_array_equal(first.faces, second.faces)
