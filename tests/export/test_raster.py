"""Which face covers which pixel, against loops and rays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from shapes import sphere, together

from dreamfusion_fast.export import raster
from dreamfusion_fast.export.mesh import Mesh
from dreamfusion_fast.export.raster import rasterize_texture, rasterize_view
from dreamfusion_fast.export.views import one, rings
from dreamfusion_fast.rendering import orbit_cameras


@pytest.mark.parametrize(("height", "width", "chunk"), [(37, 53, 1 << 22), (64, 64, 7), (1, 1, 100)])
def test_texture_against_a_loop(height, width, chunk, monkeypatch):
    monkeypatch.setattr(raster, "_CHUNK", chunk)
    rng = np.random.default_rng(1)
    uv = rng.uniform(-0.1, 1.1, (30, 2)).astype(np.float32)
    faces = np.arange(30).reshape(10, 3)
    faces[3] = 5  # a degenerate one
    index, weights = rasterize_texture(uv, faces, height, width)
    for row in range(height):
        for column in range(width):
            center = np.array([(column + 0.5) / width, 1 - (row + 0.5) / height])
            inside = {}
            for face, corners in enumerate(uv[faces].astype(np.float64)):
                matrix = np.vstack([corners.T, np.ones(3)])
                if abs(np.linalg.det(matrix)) > 1e-12:
                    solution = np.linalg.solve(matrix, [*center, 1])
                    if (solution > -1e-6).all():
                        inside[face] = solution
            if not inside:
                assert index[row, column] == -1
            else:
                assert index[row, column] == max(inside)
                np.testing.assert_allclose(weights[row, column], inside[max(inside)], atol=1e-4)


def triangles(count):
    """Large ones that cross each other, some of them so near that they reach behind a camera at distance 2."""
    rng = np.random.default_rng(2)
    centers = rng.uniform(-0.7, 0.7, (count, 1, 3))
    corners = centers + rng.uniform(-0.6, 0.6, (count, 3, 3))
    corners[::5] *= 2.5
    return Mesh(corners.reshape(-1, 3).astype(np.float32), np.arange(3 * count).reshape(count, 3))


def first_hits(mesh, cameras, view, height, width):
    """Per pixel: the nearest face that a ray meets, where, and whether that is beyond doubt (Moeller and Trumbore)."""
    rays = one(cameras, view).rays(height, width)
    origins, directions = rays.origins.double().numpy()[:, None], rays.directions.double().numpy()[:, None]
    a, b, c = np.moveaxis(mesh.corners.astype(np.float64), 1, 0)
    pose = cameras.camera_to_world[view].double().numpy()
    before = (((mesh.corners - pose[:, 3]) @ pose[:, 2]) < 0).all(1)
    across = np.cross(directions, c - a)
    determinant = ((b - a) * across).sum(-1)
    u = ((origins - a) * across).sum(-1) / determinant
    turned = np.cross(origins - a, b - a)
    v = (directions * turned).sum(-1) / determinant
    t = ((c - a) * turned).sum(-1) / determinant
    margin = np.minimum(np.minimum(u, v), 1 - u - v)
    t[(margin < 0) | ~before] = np.inf
    face = np.where(np.isfinite(t.min(1)), t.argmin(1), -1)
    nearest = np.sort(t, axis=1)[:, :2]
    with np.errstate(invalid="ignore"):
        clear = (np.abs(margin[:, before]).min(1) > 1e-3) & ~(nearest[:, 1] - nearest[:, 0] < 1e-3)
    where = origins[:, 0] + directions[:, 0] * np.where(face >= 0, nearest[:, 0], 0)[:, None]
    shape = (height, width)
    return face.reshape(shape), where.reshape(*shape, 3), clear.reshape(shape)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (113, 41), (1, 1), (1, 113), (113, 1)])
@pytest.mark.parametrize("view", [0, 1, 2])
@pytest.mark.parametrize("lens", [{}, {"pixel_aspect": [1.25] * 3, "shift": [[0.1, -0.2], [-0.1, 0.2], [0.0, 0.1]]}])
def test_view_against_rays(height, width, view, lens):
    mesh, cameras = triangles(40), orbit_cameras(3, 20.0, 2.0, 50.0)
    cameras = replace(cameras, **{name: torch.tensor(value) for name, value in lens.items()})
    seen = rasterize_view(mesh, cameras, view, height, width)
    face, where, clear = first_hits(mesh, cameras, view, height, width)
    assert seen.face.shape == (height, width)
    assert seen.weights.shape == (height, width, 3)
    if height * width > 1000:
        assert clear.mean() > 0.5
        assert len(np.unique(face)) > 10
    np.testing.assert_array_equal(seen.face[clear], face[clear])
    found = np.zeros((height, width, 3))
    found[seen.covered] = seen.interpolated(mesh.faces, mesh.vertices)
    both = clear & seen.covered
    distance = np.linalg.norm(where[both] - cameras.positions[view].numpy(), axis=1, keepdims=True)
    assert (np.abs(found[both] - where[both]) < 1e-5 * distance).all()


@pytest.mark.parametrize("chunk", [1, 500, 1 << 22])
def test_order_of_the_faces_does_not_matter(chunk, monkeypatch):
    mesh, cameras = triangles(40), orbit_cameras(1, 20.0, 2.0, 50.0)
    expected = rasterize_view(mesh, cameras, 0, 64, 48)
    monkeypatch.setattr(raster, "_CHUNK", chunk)
    order = np.random.default_rng(3).permutation(40)
    seen = rasterize_view(Mesh(mesh.vertices, mesh.faces[order]), cameras, 0, 64, 48)
    np.testing.assert_array_equal(np.where(seen.covered, order[seen.face], -1), expected.face)
    np.testing.assert_array_equal(seen.weights, expected.weights)


def test_silhouette_of_a_sphere():
    center, radius, size = np.array([0.2, -0.1, 0.3]), 0.5, 128
    cameras = rings(((-20.0, 2), (50.0, 1)), torch.zeros(3), 1.0)
    for view in range(3):
        rays = one(cameras, view).rays(size, size)
        missed = np.linalg.norm(np.cross(center - rays.origins.numpy(), rays.directions.numpy()), axis=1)
        covered = rasterize_view(sphere(center, radius), cameras, view, size, size).covered.reshape(-1)
        assert covered[missed < 0.98 * radius].all()
        assert not covered[missed > radius].any()


def test_faces_are_seen_from_both_sides():
    cameras = rings(((0.0, 1),), torch.zeros(3), 1.0)
    for inside_out in (False, True):
        assert rasterize_view(sphere((0, 0, 0), 0.5, inside_out), cameras, 0, 16, 16).covered.sum() > 20


def test_what_is_behind_or_around_the_camera_is_left_out():
    cameras = orbit_cameras(1, 0.0, 2.0, 40.0)
    front, behind = sphere((0, 0, 0), 0.3), sphere((0, 0, 4), 0.3)
    around = Mesh(np.array([[-1, -1, 3], [1, -1, 3], [0, 1, -1]], np.float32), np.array([[0, 1, 2]]))
    alone = rasterize_view(front, cameras, 0, 33, 33)
    with_others = rasterize_view(together(behind, around, front), cameras, 0, 33, 33)
    skipped = len(behind.faces) + 1
    np.testing.assert_array_equal(with_others.face, np.where(alone.covered, alone.face + skipped, -1))


@pytest.mark.parametrize("vertices", [0, 5])
def test_no_faces_cover_nothing(vertices):
    mesh = Mesh(np.zeros((vertices, 3), np.float32), np.zeros((0, 3), np.int64))
    seen = rasterize_view(mesh, orbit_cameras(1), 0, 7, 5)
    assert (seen.face == -1).all()
    assert not seen.covered.any()
    assert seen.interpolated(mesh.faces, np.zeros((vertices, 2), np.float32)).shape == (0, 2)
    index, _ = rasterize_texture(np.zeros((vertices, 2), np.float32), mesh.faces, 7, 5)
    assert (index == -1).all()
