"""Files: every surface point of a written mesh shows the colour of the field there."""

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
from shapes import BOX, grey, lumpy, renderer_of, smaller_pictures

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.export import export_field, field
from dreamfusion_fast.fields.hash_field import HashGridField, HashGridFieldConfig


def octants(positions):
    """Another colour in every octant, so that no mirror image and no exchange of axes goes unnoticed."""
    return 0.1 + 0.8 * (positions > 0).float()


@pytest.fixture(scope="module")
def glb(tmp_path_factory):
    path = tmp_path_factory.mktemp("glb") / "mesh.glb"
    with smaller_pictures():
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
    clear = (np.abs(points["POSITION"]) > 0.06).all(1)  # near a border between octants both colours are seen
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


def test_agreement_is_high_and_quiet(glb):
    agreement = glb[1].agreement
    assert agreement.iou > 0.97
    assert agreement.covered > 0.98
    assert agreement.color < 0.03
    assert agreement.warning is None


def test_agreement_is_measured_with_the_given_renderer(tmp_path, quick):
    def red(positions):
        return lumpy(positions), torch.tensor([1.0, 0.0, 0.0]).expand(len(positions), 3)

    settings = {"resolution": 24, "target_faces": 500, "texture_size": 32}
    own = export_field(grey(lumpy), BOX, tmp_path / "a.glb", **settings)
    other = export_field(grey(lumpy), BOX, tmp_path / "a.glb", renderer=renderer_of(red, 24), **settings)
    assert other.agreement.iou == own.agreement.iou
    assert own.agreement.color < 0.01
    assert other.agreement.color == pytest.approx(0.5, abs=0.01)


def test_same_field_gives_the_same_file(tmp_path, quick):
    for name in ("a.glb", "b.glb"):
        export_field(
            lambda positions: (lumpy(positions), octants(positions)),
            BOX,
            tmp_path / name,
            resolution=24,
            target_faces=500,
            texture_size=32,
        )
    assert (tmp_path / "a.glb").read_bytes() == (tmp_path / "b.glb").read_bytes()


@pytest.mark.slow
def test_example_of_the_documentation_runs():
    results = doctest.testmod(field)
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("reach", [1.0, 1.5])
def test_any_field_of_the_package_can_be_exported(tmp_path, quick, reach):
    """Also a part of one, of a larger box than is asked for."""
    config = HashGridFieldConfig(levels=2, finest_resolution=16, log2_rows=8, hidden=8, backend="reference")
    summary = export_field(
        HashGridField(config, (-reach,) * 3 + (reach,) * 3),
        BOX,
        tmp_path / "a.glb",
        resolution=12,
        threshold=1.0,
        target_faces=0,
        texture_size=32,
    )
    _document, _, attributes, faces, _ = read_glb(tmp_path / "a.glb")
    assert summary.faces == len(faces) > 50
    assert np.linalg.norm(attributes["POSITION"], axis=1).max() < 1


def test_nothing_to_write_says_so_and_leaves_no_file(tmp_path):
    with pytest.raises(UserError, match="there is no surface"):
        export_field(lambda p: (torch.zeros(len(p)), octants(p)), BOX, tmp_path / "a.glb", resolution=8)
    assert os.listdir(tmp_path) == []
