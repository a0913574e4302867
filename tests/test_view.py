"""The page of a mesh, as a browser shows it."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from browser import browser, needs_browser, wait_until_drawn
from PIL import Image

from dreamfusion_fast import cli
from dreamfusion_fast.errors import UserError
from dreamfusion_fast.view import page, write_view

RED, BLUE = (200, 30, 20), (20, 40, 210)


def glb() -> bytes:
    """A slab of two halves: red towards +Z, where a camera is at first, and blue behind."""
    front, back = (trimesh.creation.box((1.0, 1.0, 0.2), trimesh.transformations.translation_matrix((0, 0, z)))
                   for z in (0.1, -0.1))  # fmt: skip
    front.visual.face_colors, back.visual.face_colors = (*RED, 255), (*BLUE, 255)
    return trimesh.Scene([front, back]).export(file_type="glb")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "<a> & b"
    folder.mkdir()
    (folder / "checkpoint.safetensors").touch()
    (folder / "mesh.glb").write_bytes(glb())
    return folder


def screenshot(page: Any) -> np.ndarray[Any, Any]:
    return np.array(Image.open(io.BytesIO(page.screenshot())).convert("RGB"), dtype=float)


def share(picture: np.ndarray[Any, Any], color: int, other: int) -> float:
    """Share of the pixels in which one channel is far above another."""
    return float((picture[..., color] - picture[..., other] > 60).mean())


@needs_browser()
def test_a_browser_shows_the_mesh_from_all_sides(run: Path) -> None:
    address = write_view(run).resolve().as_uri()
    with browser(300, 260) as context:
        context.set_offline(True)
        page = context.new_page()
        page.goto(address)
        viewer = page.locator("model-viewer")
        wait_until_drawn(viewer)
        front = screenshot(page)
        viewer.evaluate("viewer => { viewer.cameraOrbit = '180deg 80deg 3m'; viewer.jumpCameraToGoal(); }")
        wait_until_drawn(viewer)
        back = screenshot(page)
        page.close()
        page = context.new_page()  # the address says where the camera is
        page.goto(f"{address}#orbit=180deg 80deg 3m")
        assert page.locator("model-viewer").get_attribute("camera-orbit") == "180deg 80deg 3m"
    assert share(front, 0, 2) > 0.1
    assert share(front, 2, 0) < 0.02
    assert share(back, 2, 0) > 0.1
    assert share(back, 0, 2) < 0.02


def test_the_page_is_one_file(run: Path) -> None:
    (run / "turntable.mp4").write_bytes(b"a video")
    path = write_view(run)
    assert path == run / "view.html"
    text = path.read_text()
    assert "<title>&lt;a&gt; &amp; b</title>" in text
    assert base64.b64encode(b"a video").decode() in text
    assert base64.b64encode((run / "mesh.glb").read_bytes()).decode() in text
    assert re.findall(r"""(?:src|href)=["'](?!data:)""", text.partition('<script type="module">')[0]) == []
    assert "default-src 'none'" in text


def test_the_command_opens_it_or_does_not(run: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert cli.main(["view", str(run)]) == 0
    assert opened == [(run / "view.html").as_uri()]
    assert cli.main(["view", str(run / "mesh.glb"), "--no-open", "--out", str(tmp_path / "x.html")]) == 0
    assert len(opened) == 1
    assert capsys.readouterr().out.endswith(f"done: {tmp_path / 'x.html'}\n")


def test_what_cannot_be_shown_is_one_line(tmp_path: Path, run: Path, capsys: Any) -> None:
    assert cli.main(["view", str(tmp_path / "absent"), "--no-open"]) == 2
    assert "is no folder" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"cannot write .*No such file"):
        write_view(run, tmp_path / "absent" / "x.html")
    (run / "mesh.glb").write_text("glTX")
    with pytest.raises(UserError, match="holds no binary glTF mesh"):
        write_view(run)
    (run / "mesh.glb").unlink()
    with pytest.raises(UserError, match=r"holds no mesh.glb yet: dreamfusion-fast export"):
        write_view(run)
    with pytest.raises(UserError, match="x holds no binary glTF mesh"):
        page("x", b"")
