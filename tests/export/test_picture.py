"""Pictures of textured meshes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from shapes import one_colour, sphere

from dreamfusion_fast.export import UnwrappedMesh, render_mesh
from dreamfusion_fast.export import picture as module
from dreamfusion_fast.export.mesh import Mesh
from dreamfusion_fast.export.picture import mesh_colors
from dreamfusion_fast.export.raster import rasterize_view
from dreamfusion_fast.export.views import rings

COLOR = np.array([[[200, 100, 0]]], np.uint8)
FRONT = rings(((0.0, 1),), torch.zeros(3), 1.0)


@pytest.mark.parametrize("size", [7, 33, 24])
def test_picture_has_its_size_and_a_white_background(size):
    picture = render_mesh(one_colour(sphere((0, 0, 0), 0.5)), COLOR, FRONT, 0, size)
    assert picture.shape == (size, size, 3)
    assert picture.dtype == np.uint8
    assert (picture[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    assert (picture[size // 2, size // 2] < 255).any()


@pytest.mark.parametrize("view", [0, 1, 2])
def test_light_comes_from_the_upper_right_of_any_camera(view):
    cameras = rings(((0.0, 2), (50.0, 1)), torch.zeros(3), 1.0)
    picture = render_mesh(one_colour(sphere((0, 0, 0), 0.9)), COLOR, cameras, view, 64)[:, :, 0].astype(int)
    upper_right, middle, lower_left = picture[20, 42], picture[32, 32], picture[46, 18]
    assert upper_right > middle > lower_left
    assert lower_left >= 0.65 * 200 - 1


def test_edges_are_between_the_colours_with_more_samples(monkeypatch):
    edges = {}
    for samples in (1, 4):
        monkeypatch.setattr(module, "_SAMPLES", samples)
        picture = render_mesh(one_colour(sphere((0, 0, 0), 0.5)), COLOR, FRONT, 0, 32)
        assert picture.shape == (32, 32, 3)
        edges[samples] = ((picture[:, :, 1] > 110) & (picture[:, :, 1] < 255)).sum()  # lit, the ball is 110 at most
    assert edges[1] == 0
    assert edges[4] > 20


def test_texture_is_the_right_way_up():
    vertices = np.array([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0.5, 0.5, 0], [-0.5, 0.5, 0]], np.float32)
    mesh = Mesh(vertices, np.array([[0, 1, 2], [0, 2, 3]]))
    quad = UnwrappedMesh(mesh, mesh.vertex_normals(), vertices[:, :2] + 0.5)
    texture = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 0, 0]]], np.uint8)
    picture = render_mesh(quad, texture, FRONT, 0, 64)
    corners = [picture[24, 24], picture[24, 40], picture[40, 24], picture[40, 40]]
    assert (np.abs(np.array(corners, int) - texture.reshape(4, 3)) < 40).all()


def test_colours_between_texels_are_linear():
    vertices = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], np.float32)
    mesh = Mesh(vertices, np.array([[0, 1, 2], [0, 2, 3]]))
    quad = UnwrappedMesh(mesh, mesh.vertex_normals(), 0.5 * vertices[:, :2] + 0.5)
    ramp = np.repeat(np.arange(0, 256, 17, dtype=np.uint8)[None, :, None], 3, 2)
    seen = rasterize_view(mesh, FRONT, 0, 50, 50)
    u = seen.interpolated(mesh.faces, quad.uv)[:, 0]
    expected = np.clip((u * 16 - 0.5) / 15, 0, 1)
    np.testing.assert_allclose(mesh_colors(quad, ramp, seen), expected[:, None].repeat(3, 1), atol=1e-4)


def test_nothing_is_all_white():
    mesh = Mesh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int64))
    assert (render_mesh(one_colour(mesh), COLOR, FRONT, 0, 9) == 255).all()
