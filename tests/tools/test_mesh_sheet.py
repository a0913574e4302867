"""Sheets of meshes show what is in the files."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreamfusion_fast.export import export_field, render_mesh
from dreamfusion_fast.rendering import orbit_cameras

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import mesh_sheet


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    """A ball, red to the left of the camera and green to the right, in a run's folder, and what was exported."""

    def field(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        right = (positions[:, :1] > 0).float()
        colors = torch.cat([1 - right, right, torch.zeros_like(right)], dim=1)
        return 100 * (positions.norm(dim=1) < 0.6).float(), colors

    path = tmp_path_factory.mktemp("runs") / "a_ball" / "mesh.glb"
    path.parent.mkdir()
    box = torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0, 1.0])
    return path, export_field(field, box, path, resolution=24, texture_size=128)


@pytest.mark.slow
def test_the_file_looks_like_what_was_exported(mesh: tuple[Path, object]) -> None:
    path, exported = mesh
    loaded, texture = mesh_sheet.load(path)
    cameras = orbit_cameras(1)
    ours = render_mesh(exported.unwrapped, exported.texture, cameras, 0, 48).astype(int)
    theirs = render_mesh(loaded, texture, cameras, 0, 48).astype(int)
    assert np.quantile(np.abs(ours - theirs), 0.99) <= 2  # between red and green, a texel is a matter of rounding


def test_a_sheet_has_a_cell_for_each_mesh(
    mesh: tuple[Path, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sheet.png"
    options = [str(mesh[0])] * 3 + ["--views", "2", "--size", "40", "--columns", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["mesh_sheet.py", *options])
    mesh_sheet.main()
    sheet = np.array(Image.open(out)).astype(int)
    assert sheet.shape == (2 * 54, 2 * 80, 3)
    assert (sheet[54:, 80:] == 255).all()  # the place left over
    front = sheet[14:54, :40]
    assert front[20, 14, 0] > front[20, 14, 1] + 50  # red to the left
    assert front[20, 26, 1] > front[20, 26, 0] + 50
