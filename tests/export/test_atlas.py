"""Charts are made in a process of its own, and what happens there ends nothing here."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import trimesh
from shapes import sphere

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.export import atlas, texture
from dreamfusion_fast.export.mesh import Mesh
from dreamfusion_fast.export.texture import unwrap


def round_mesh(subdivisions):
    made = trimesh.creation.icosphere(subdivisions=subdivisions, radius=0.6)
    return Mesh(np.asarray(made.vertices, np.float32), np.asarray(made.faces, np.int64))


def test_charts_are_the_mesh_cut_open():
    mesh = sphere((0, 0, 0), 0.5)
    cut = unwrap(mesh, 64)
    assert cut.mesh.faces.shape == mesh.faces.shape
    np.testing.assert_allclose(cut.mesh.corners, mesh.corners)
    assert cut.uv.shape == (len(cut.mesh.vertices), 2)
    assert cut.uv.dtype == cut.mesh.vertices.dtype == np.float32


@pytest.mark.slow
def test_a_round_mesh_of_82_000_faces_is_cut(caplog):
    """xatlas 0.0.11 has a segmentation fault over it."""
    mesh = round_mesh(6)
    with caplog.at_level(logging.WARNING):
        cut = unwrap(mesh)
    if len(cut.mesh.faces) == len(mesh.faces):  # an xatlas that can
        assert caplog.text == ""
    else:
        assert len(cut.mesh.faces) == pytest.approx(len(mesh.faces) / 2, rel=0.01)
        assert "xatlas cannot cut 81920 faces into charts" in caplog.text
    np.testing.assert_allclose(np.linalg.norm(cut.mesh.vertices, axis=1), 0.6, rtol=1e-2)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "Segmentation fault"),
        ("raise MemoryError('no room')", "MemoryError: no room"),
        ("import os; os._exit(3)", "exit code 3"),
    ],
)
def test_how_the_other_process_ended_is_said(monkeypatch, program, message):
    monkeypatch.setattr(atlas, "_PROGRAM", program)
    mesh = round_mesh(1)
    with pytest.raises(atlas.AtlasError, match=message):
        atlas.make_atlas(mesh.vertices, mesh.faces, mesh.vertex_normals(), 64, 4)


def test_a_mesh_that_cannot_be_cut_gets_fewer_faces_until_it_can(monkeypatch, caplog):
    def cut_small_ones(vertices, faces, *rest):
        if len(faces) > 3000:
            raise atlas.AtlasError("Segmentation fault")
        return atlas.make_atlas(vertices, faces, *rest)

    monkeypatch.setattr(texture, "make_atlas", cut_small_ones)
    mesh = round_mesh(5)
    with caplog.at_level(logging.WARNING):
        cut = unwrap(mesh, 64)
    assert len(cut.mesh.faces) == pytest.approx(len(mesh.faces) / 8, rel=0.05)
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        f"xatlas cannot cut {n} faces into charts (Segmentation fault)" for n in (20480, 10240, 5120)
    ]


def test_one_that_never_can_is_an_error_in_one_line(monkeypatch):
    def never(*_):
        raise atlas.AtlasError("Segmentation fault")

    monkeypatch.setattr(texture, "make_atlas", never)
    with pytest.raises(UserError, match="cannot cut the mesh into charts"):
        unwrap(round_mesh(4), 64)


def test_nothing_in_the_current_folder_is_imported(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("numpy", "xatlas", "runpy", "io", "signal"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this was run')")
    assert len(unwrap(round_mesh(1), 64).mesh.faces) == 80
