"""Textures: charts, colours, gutters, and how they are saved."""

from __future__ import annotations

import os

import numpy as np
import pytest
import scipy.ndimage
import torch
from shapes import BOX, extract, hard, lumpy, renderer_of, soft, sphere, to_segment

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.export.mesh import Mesh
from dreamfusion_fast.export.texture import LOOK_INTO, bake, save_glb, seen_colors, unwrap
from dreamfusion_fast.rendering.config import RendererConfig
from dreamfusion_fast.rendering.volume.renderer import VolumeRenderer

pytestmark = pytest.mark.usefixtures("quick")

RED, GREEN, BLUE = torch.eye(3)


def looking_into(field, voxel, step=None):
    """The colours of a field, seen with rays of the length that an export gives them."""
    config = RendererConfig(step=step or voxel, far=LOOK_INTO * voxel)
    return seen_colors(VolumeRenderer(field, config=config), voxel)


def test_seams_share_normals():
    mesh = extract(lumpy, BOX, resolution=24, threshold=50.0, target_faces=1000)
    cut = unwrap(mesh, 128)
    places, inverse = np.unique(cut.mesh.vertices, axis=0, return_inverse=True)
    assert len(places) < len(cut.normals)  # there are seams
    first = np.zeros((len(places), 3), np.float32)
    first[inverse.reshape(-1)] = cut.normals
    np.testing.assert_array_equal(first[inverse.reshape(-1)], cut.normals)
    assert cut.uv.min() >= 0
    assert cut.uv.max() <= 1


def test_gutters_take_the_nearest_colour():
    quad = Mesh(
        np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], np.float32), np.array([[0, 1, 2], [0, 2, 3]], np.int64)
    )
    cut = unwrap(quad, 64)
    cut.uv[:] = cut.uv * 0.5 + 0.25  # leave a wide margin
    texture = bake(cut, lambda positions, _: positions.new_tensor([0.2, 0.4, 0.6]).expand(len(positions), 3), 64)
    assert texture.dtype == np.uint8
    assert (texture == [51, 102, 153]).all()


def test_bake_runs_in_chunks_and_survives_bad_colours():
    mesh = extract(lumpy, BOX, resolution=16, threshold=50.0, target_faces=200)
    cut = unwrap(mesh, 33)
    sizes = []

    def colors(positions, normals):
        assert normals.shape == positions.shape
        np.testing.assert_allclose(normals.norm(dim=-1), 1, atol=1e-5)
        sizes.append(len(positions))
        return torch.full_like(positions, torch.nan if len(sizes) == 1 else 7.0)

    texture = bake(cut, colors, 33, chunk=113)
    assert max(sizes) == 113
    assert set(np.unique(texture)) == {0, 255}


def test_colour_is_that_of_what_absorbs_the_light():
    """Red haze outside an opaque blue body: of the light, the haze takes what it absorbs on the way to the body."""
    voxel, density = 0.05, 2.0

    def field(positions):
        inside = positions[:, 2:] < 0
        return torch.where(inside[:, 0], 4000.0, density), torch.where(inside, BLUE, RED)

    positions, normals = torch.zeros(3, 3), torch.tensor([0.0, 0.0, 1.0]).expand(3, 3)
    haze = 1 - np.exp(-density * 1.5 * voxel)
    color = looking_into(field, voxel, step=voxel / 50)(positions, normals)
    np.testing.assert_allclose(color, [[haze, 0, 1 - haze]] * 3, atol=density * voxel / 50)


def test_soft_ball_in_a_fog_shows_its_own_colour():
    def field(positions):
        matter = 60 * torch.sigmoid(30 * (0.4 - positions.norm(dim=1)))
        return matter + 0.3, torch.where(matter[:, None] > 3, BLUE, RED)

    mesh = extract(lambda positions: field(positions)[0], BOX, resolution=32, target_faces=1000)
    places, normals = torch.from_numpy(mesh.vertices), torch.from_numpy(mesh.vertex_normals())
    assert (field(places)[1] == RED).all(1).float().mean() > 0.9  # at the very surface is the fog
    color = seen_colors(renderer_of(field, 32), 2 / 32)(places, normals)
    assert color[:, 2].min() > 0.75
    np.testing.assert_allclose(color.sum(1), 1, atol=1e-4)


@pytest.mark.parametrize(("kind", "distance", "own"), [(hard, 0.15, 1.0), (soft, 0.15, 0.9), (soft, 0.4, 1.0)])
def test_thin_rod_before_a_wall_keeps_its_colour(kind, distance, own):
    """Only the near colour is seen, whatever is behind a rod that lets 8 % of the light through."""
    voxel = 2 / 128

    def field(positions):
        rod = kind(to_segment(positions, [-0.5, 0.0, 0.3], [0.5, 0.0, 0.3]))
        wall = positions[:, 2] < 0.3 - distance
        return rod + 400.0 * wall, torch.where(wall[:, None], RED, GREEN)

    positions = torch.stack([torch.linspace(-0.4, 0.4, 17), torch.zeros(17), torch.full((17,), 0.32)], 1)
    color = looking_into(field, voxel)(positions, torch.tensor([0.0, 0.0, 1.0]).expand(17, 3))
    np.testing.assert_allclose(color, [[1 - own, own, 0]] * 17, atol=0.03)


def test_place_without_matter_has_the_colour_of_the_field():
    def field(positions):
        return torch.zeros(len(positions)), 0.5 + 0.5 * positions

    positions = torch.rand(20, 3) - 0.5
    color = looking_into(field, 0.05)(positions, torch.zeros(20, 3))
    np.testing.assert_allclose(color, 0.5 + 0.5 * positions, atol=1e-6)


def test_place_without_a_normal_is_looked_at_from_above():
    def field(positions):
        return torch.full((len(positions),), 100.0), GREEN.expand(len(positions), 3)

    color = looking_into(field, 0.05)(torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    np.testing.assert_allclose(color, [[0, 1, 0]] * 2, atol=1e-5)


def at(texture, uv):
    """Colours of a texture at uv [n, 2], between texels linearly."""
    height, width, _ = texture.shape
    where = [(1 - uv[:, 1]) * height - 0.5, uv[:, 0] * width - 0.5]
    channels = [
        scipy.ndimage.map_coordinates(texture[..., c] / 255.0, where, order=1, mode="nearest") for c in range(3)
    ]
    return np.stack(channels, -1)


def test_both_sides_of_a_seam_have_the_same_colour():
    def field(positions):
        return lumpy(positions), 0.5 + 0.5 * torch.sin(positions)

    size, voxel = 256, 2 / 48
    cut = unwrap(extract(lumpy, BOX, resolution=48, threshold=50.0, target_faces=2000), size)
    colors = at(bake(cut, seen_colors(renderer_of(field, 48), voxel), size), cut.uv)
    places, inverse, count = np.unique(cut.mesh.vertices, axis=0, return_inverse=True, return_counts=True)
    assert (count > 1).sum() > 100
    low, high = np.full((len(places), 3), np.inf), np.full((len(places), 3), -np.inf)
    np.minimum.at(low, inverse.reshape(-1), colors)
    np.maximum.at(high, inverse.reshape(-1), colors)
    difference = (high - low)[count > 1].max(1)
    assert difference.max() < 0.03
    assert difference.mean() < 0.01


def test_nothing_to_unwrap_or_to_bake_says_what_to_try():
    with pytest.raises(UserError, match="no faces; export with a lower --threshold"):
        unwrap(Mesh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int64)))
    cut = unwrap(sphere((0, 0, 0), 0.5), 64)
    cut.uv[:] = 0
    with pytest.raises(UserError, match=r"no face covers a texel of a 8 x 8 texture; .* --texture-size"):
        bake(cut, lambda positions, _: positions, 8)


def test_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.glb"
    path.write_bytes(b"old")
    cut = unwrap(extract(lumpy, BOX, resolution=16, threshold=50.0, target_faces=200), 32)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        save_glb(path, cut, np.zeros((32, 32, 3), np.uint8))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.glb"]
