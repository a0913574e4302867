"""Textures: every surface point of the written file shows the colour of the field there."""

from __future__ import annotations

import doctest
import io
import json
import os
import struct

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.export import export_field, field
from dreamfusion_fast.export.mesh import Mesh, extract_mesh
from dreamfusion_fast.export.texture import at_surface, bake, composited, rasterize, save_glb, unwrap
from dreamfusion_fast.fields.hash_field import HashGridField, HashGridFieldConfig

BOX = torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0, 1.0])


def octants(positions):
    """Another colour in every octant, so that no mirror image and no exchange of axes goes unnoticed."""
    return 0.1 + 0.8 * (positions > 0).float()


def lumpy(positions):
    """Density without symmetry: a ball with an arm along +x and a nose along +z."""
    body = positions.norm(dim=-1) - 0.5
    nose = (positions - torch.tensor([0.0, 0.1, 0.55])).norm(dim=-1) - 0.2
    arm = (positions - torch.tensor([0.6, 0.2, 0.0])).norm(dim=-1) - 0.2
    return 100 * torch.sigmoid(-80 * torch.minimum(torch.minimum(body, nose), arm))


@pytest.fixture(scope="module")
def glb(tmp_path_factory):
    path = tmp_path_factory.mktemp("glb") / "mesh.glb"
    summary = export_field(
        lambda positions: (lumpy(positions), octants(positions)),
        BOX,
        path,
        resolution=48,
        target_faces=3000,
        texture_size=256,
    )
    return path, summary


def read_glb(path):
    """A reader of its own, by the glTF 2.0 specification: a mistake that trimesh makes twice would cancel out."""
    data = path.read_bytes()
    magic, version, length = struct.unpack("<4sII", data[:12])
    assert (magic, version, length) == (b"glTF", 2, len(data))
    chunks, offset = {}, 12
    while offset < length:
        size, kind = struct.unpack("<I4s", data[offset : offset + 8])
        chunks[kind] = data[offset + 8 : offset + 8 + size]
        offset += 8 + size
    document, binary = json.loads(chunks[b"JSON"]), chunks[b"BIN\0"]

    def view(index):
        entry = document["bufferViews"][index]
        start = entry.get("byteOffset", 0)
        return binary[start : start + entry["byteLength"]]

    def accessor(index):
        entry = document["accessors"][index]
        kind = {5121: np.uint8, 5123: np.uint16, 5125: np.uint32, 5126: np.float32}[entry["componentType"]]
        width = {"SCALAR": 1, "VEC2": 2, "VEC3": 3}[entry["type"]]
        start = entry.get("byteOffset", 0)
        return np.frombuffer(view(entry["bufferView"])[start:], kind, entry["count"] * width).reshape(-1, width)

    (mesh,) = document["meshes"]
    (primitive,) = mesh["primitives"]
    material = document["materials"][primitive["material"]]["pbrMetallicRoughness"]
    image = document["images"][document["textures"][material["baseColorTexture"]["index"]]["source"]]
    texture = np.array(Image.open(io.BytesIO(view(image["bufferView"]))))
    attributes = {name: accessor(index) for name, index in primitive["attributes"].items()}
    return document, material, attributes, accessor(primitive["indices"]).reshape(-1, 3), texture


def surface_points(attributes, faces, count):
    rng = np.random.default_rng(0)
    chosen = faces[rng.integers(len(faces), size=count)]
    weights = rng.dirichlet([1, 1, 1], size=count)[:, :, None]
    return {name: (values[chosen] * weights).sum(1) for name, values in attributes.items()}


def test_written_colours_are_the_fields(glb):
    _, _, attributes, faces, texture = read_glb(glb[0])
    points = surface_points(attributes, faces, 20_000)
    height, width, _ = texture.shape
    # glTF: u to the right, v downward, from the upper left corner of the image.
    column = np.clip((points["TEXCOORD_0"][:, 0] * width).astype(int), 0, width - 1)
    row = np.clip((points["TEXCOORD_0"][:, 1] * height).astype(int), 0, height - 1)
    found = texture[row, column, :3] / 255
    wanted = octants(torch.from_numpy(points["POSITION"])).numpy()
    clear = (np.abs(points["POSITION"]) > 0.04).all(1)  # a texel at a border between octants is either colour
    assert clear.mean() > 0.5
    error = np.abs(found - wanted).max(1)[clear]
    assert (error < 0.02).mean() > 0.995


def test_file_has_normals_one_rough_material_and_up_is_y(glb):
    document, material, attributes, faces, texture = read_glb(glb[0])
    assert material["metallicFactor"] == 0
    assert material["roughnessFactor"] >= 0.9
    assert texture.shape[:2] == (256, 256)
    assert document["images"][0]["mimeType"] == "image/png"
    assert all(set(node) <= {"name", "mesh", "children"} for node in document["nodes"])  # no hidden rotation
    np.testing.assert_allclose(np.linalg.norm(attributes["NORMAL"], axis=1), 1, atol=1e-3)
    corners = attributes["POSITION"][faces]
    geometric = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    agreement = np.einsum("ij,ij->i", geometric, attributes["NORMAL"][faces].mean(1))
    assert (agreement > 0).mean() > 0.99
    assert attributes["POSITION"][:, 0].max() > 0.75  # the arm, on +x
    assert attributes["POSITION"][:, 2].max() > 0.7  # the nose, on +z


def test_trimesh_reads_it_back(glb):
    path, summary = glb
    mesh = trimesh.load(path, force="mesh")
    assert len(mesh.faces) == summary.faces <= 3000
    assert mesh.visual.material.baseColorTexture.size == (256, 256)
    merged = trimesh.Trimesh(mesh.vertices, mesh.faces)
    merged.merge_vertices(merge_tex=True, merge_norm=True)
    assert merged.is_watertight
    assert merged.volume > 0
    assert os.listdir(path.parent) == ["mesh.glb"]


def test_example_of_the_documentation_runs():
    results = doctest.testmod(field)
    assert results.attempted > 0
    assert results.failed == 0


def test_any_field_of_the_package_can_be_exported(tmp_path):
    config = HashGridFieldConfig(levels=2, finest_resolution=16, log2_rows=8, hidden=8, backend="reference")
    summary = export_field(
        HashGridField(config), BOX, tmp_path / "a.glb", resolution=12, threshold=1.0, target_faces=0, texture_size=32
    )
    _document, _, attributes, faces, _ = read_glb(tmp_path / "a.glb")
    assert summary.faces == len(faces) > 50
    assert np.linalg.norm(attributes["POSITION"], axis=1).max() < 1


def test_seams_share_normals():
    mesh = extract_mesh(lumpy, BOX, resolution=24, target_faces=1000)
    cut = unwrap(mesh, 128)
    places, inverse = np.unique(cut.mesh.vertices, axis=0, return_inverse=True)
    assert len(places) < len(cut.normals)  # there are seams
    first = np.zeros((len(places), 3), np.float32)
    first[inverse.reshape(-1)] = cut.normals
    np.testing.assert_array_equal(first[inverse.reshape(-1)], cut.normals)
    assert cut.uv.min() >= 0
    assert cut.uv.max() <= 1


@pytest.mark.parametrize(("height", "width", "chunk"), [(37, 53, 1 << 22), (64, 64, 7), (1, 1, 100)])
def test_rasterize_against_a_loop(height, width, chunk):
    rng = np.random.default_rng(1)
    uv = rng.uniform(-0.1, 1.1, (30, 2)).astype(np.float32)
    faces = np.arange(30).reshape(10, 3)
    faces[3] = 5  # a degenerate one
    index, weights = rasterize(uv, faces, height, width, chunk)
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


def test_gutters_take_the_nearest_colour():
    quad = Mesh(
        np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], np.float32), np.array([[0, 1, 2], [0, 2, 3]], np.int64)
    )
    cut = unwrap(quad, 64)
    cut.uv[:] = cut.uv * 0.5 + 0.25  # leave a wide margin
    texture = bake(
        cut, at_surface(lambda positions: positions.new_tensor([0.2, 0.4, 0.6]).expand(len(positions), 3)), 64
    )
    assert texture.dtype == np.uint8
    assert (texture == [51, 102, 153]).all()


def test_bake_runs_in_chunks_and_survives_bad_colours():
    mesh = extract_mesh(lumpy, BOX, resolution=16, target_faces=200)
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


def test_composited_colour_is_that_of_the_absorbing_depth():
    """Red haze outside an opaque blue body: the surface shows blue, and a hard surface its own colour."""
    blue, red = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0])

    def field(positions):
        inside = positions[:, 2:] < 0
        return torch.where(inside[:, 0], 200.0, 1.0), torch.where(inside, blue, red)

    positions = torch.zeros(3, 3)
    normals = torch.tensor([0.0, 0.0, 1.0]).expand(3, 3)
    step = 0.05
    color = composited(field, step, outside=1.0, samples=4)(positions, normals)
    haze = 1 - np.exp(-step)  # alpha of the one sample outside
    total = haze + np.exp(-step) * (1 - np.exp(-3 * 200 * step))
    np.testing.assert_allclose(color, [[haze / total, 0, 1 - haze / total]] * 3, atol=1e-6)
    empty = composited(lambda p: (torch.zeros(len(p)), red.expand(len(p), 3)), step)(positions, normals)
    np.testing.assert_allclose(empty, [[1, 0, 0]] * 3, atol=1e-6)


def test_nothing_to_write_says_so_and_leaves_no_file(tmp_path):
    with pytest.raises(UserError, match="there is no surface"):
        export_field(lambda p: (torch.zeros(len(p)), octants(p)), BOX, tmp_path / "a.glb", resolution=8)
    with pytest.raises(UserError, match="no faces"):
        unwrap(Mesh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int64)))
    assert os.listdir(tmp_path) == []


def test_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.glb"
    path.write_bytes(b"old")
    cut = unwrap(extract_mesh(lumpy, BOX, resolution=16, target_faces=200), 32)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        save_glb(path, cut, np.zeros((32, 32, 3), np.uint8))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.glb"]
