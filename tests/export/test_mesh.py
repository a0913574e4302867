"""Meshes: pieces, orientation, smoothing, decimation."""

from __future__ import annotations

import numpy as np
import pytest
from shapes import BOX, as_trimesh, ball, extract, sphere, together

from dreamfusion_fast.export.mesh import (
    Mesh,
    components,
    decimate,
    keep_faces,
    keep_large_components,
    outward,
    smooth,
    without_degenerate,
)


def test_normals_are_unit_and_of_float32():
    mesh = sphere((0, 0, 0), 0.5)
    normals = mesh.vertex_normals()
    assert normals.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(normals, 2 * mesh.vertices, atol=0.02)


def test_vertices_of_degenerate_faces_still_have_a_unit_normal():
    mesh = Mesh(np.array([[0, 0, 0], [1, 0, 0], [2, 0, 0]], np.float32), np.array([[0, 1, 2]]))
    np.testing.assert_allclose(np.linalg.norm(mesh.vertex_normals(), axis=1), 1)


def test_length_of_a_face_normal_is_twice_its_area():
    mesh = Mesh(np.array([[0, 0, 0], [3, 0, 0], [0, 2, 0]], np.float32), np.array([[0, 1, 2]]))
    np.testing.assert_allclose(mesh.face_normals(), [[0, 0, 6]])


def test_components_are_what_hangs_together():
    first, second = sphere((-0.5, 0, 0), 0.2), sphere((0.5, 0, 0), 0.2)
    both = together(first, second)
    mixed = np.random.default_rng(0).permutation(len(both.faces))
    piece = components(Mesh(both.vertices, both.faces[mixed]))
    assert set(piece) == {0, 1}
    right = both.corners[mixed].mean(1)[:, 0] > 0
    assert (right == (piece == piece[right][0])).all()


def test_kept_faces_keep_their_vertices_only():
    both = together(sphere((-0.5, 0, 0), 0.2), sphere((0.5, 0, 0), 0.2))
    kept = keep_faces(both, both.corners.mean(1)[:, 0] > 0)
    assert len(kept.vertices) == len(both.vertices) // 2
    np.testing.assert_array_equal(kept.corners, both.corners[len(both.faces) // 2 :])
    nothing = keep_faces(both, np.zeros(len(both.faces), bool))
    assert (nothing.vertices.shape, nothing.faces.shape) == ((0, 3), (0, 3))


@pytest.mark.parametrize(("min_component", "pieces"), [(0.0, 2), (0.15, 2), (0.17, 1)])
def test_small_pieces_are_dropped_by_area(min_component, pieces):
    mesh = keep_large_components(together(sphere((-0.3, 0, 0), 0.5), sphere((0.6, 0, 0), 0.2)), min_component)
    assert as_trimesh(mesh).body_count == pieces
    assert (mesh.vertices[:, 0].max() > 0.7) == (pieces == 2)


def test_walls_of_cavities_are_dropped():
    mesh = keep_large_components(together(sphere((0, 0, 0), 0.4, inside_out=True), sphere((0, 0, 0), 0.6)), 0.0)
    assert as_trimesh(mesh).body_count == 1
    assert np.linalg.norm(mesh.vertices, axis=1).min() > 0.59


def test_parts_keep_the_orientation():
    mesh = extract(ball((0.0, 0.0, 0.0), 0.5), BOX, resolution=24, threshold=50.0, smooth_iterations=0, target_faces=0)
    for changed in (smooth(mesh, 3), decimate(mesh, 500), keep_large_components(mesh, 0.5), outward(mesh)):
        assert as_trimesh(changed).volume == pytest.approx(as_trimesh(mesh).volume, rel=0.05)


def test_smoothing_flattens_bumps_and_keeps_the_size():
    even = sphere((0, 0, 0), 0.5)
    bumpy = Mesh(even.vertices * np.random.default_rng(0).uniform(0.97, 1.03, (len(even.vertices), 1)), even.faces)
    smoothed = smooth(Mesh(bumpy.vertices.astype(np.float32), even.faces), 5)
    radius = np.linalg.norm(smoothed.vertices, axis=1)
    assert radius.std() < 0.5 * np.linalg.norm(bumpy.vertices, axis=1).std()
    assert radius.mean() == pytest.approx(0.5, rel=0.01)
    assert smoothed.vertices.dtype == np.float32


def test_decimation_reaches_its_target_and_keeps_the_shape():
    mesh = decimate(sphere((0, 0, 0), 0.5), 400)
    assert 300 < len(mesh.faces) <= 400
    assert as_trimesh(mesh).is_watertight
    assert np.abs(np.linalg.norm(mesh.vertices, axis=1) - 0.5).max() < 0.02


def test_outward_turns_what_is_inside_out():
    right = sphere((0.2, 0, 0), 0.5)
    assert outward(right) is right
    turned = outward(sphere((0.2, 0, 0), 0.5, inside_out=True))
    np.testing.assert_array_equal(turned.faces, right.faces)


def test_doubled_vertices_are_merged_and_degenerate_faces_dropped():
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0], [5, 5, 5]], np.float32)
    faces = np.array([[0, 1, 2], [3, 4, 2], [0, 1, 3], [4, 4, 2]])
    mesh = without_degenerate(Mesh(vertices, faces))
    assert len(mesh.vertices) == 4
    np.testing.assert_array_equal(mesh.corners, vertices[faces[:2]])


def test_fins_are_dropped():
    """Two faces of the same corners, as decimation leaves them where a spike has collapsed."""
    body = sphere((0, 0, 0), 0.5)
    tip = len(body.vertices)
    a, b = body.faces[0, :2]
    fin = np.array([[a, b, tip], [b, a, tip]])
    mesh = Mesh(np.concatenate([body.vertices, [[0, 2, 0]]]).astype(np.float32), np.concatenate([body.faces, fin]))
    cleaned = without_degenerate(mesh)
    assert len(cleaned.faces) == len(body.faces)
    assert as_trimesh(cleaned).is_watertight
