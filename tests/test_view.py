"""The page of a mesh, as a browser shows it."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from PIL import Image

from dreamfusion_fast import cli
from dreamfusion_fast.errors import UserError
from dreamfusion_fast.view import page, write_view

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
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


def screenshot(address: str, folder: Path) -> np.ndarray[Any, Any]:
    """The page at 300 x 260 pixels, in a browser that finds nothing but files."""
    assert CHROMIUM is not None
    picture = folder / "page.png"
    words = "--headless --no-sandbox --disable-gpu --use-angle=swiftshader --enable-unsafe-swiftshader --no-first-run"
    words += " --disable-background-networking --hide-scrollbars --window-size=300,260 --proxy-server=127.0.0.1:9"
    words += f" --user-data-dir={folder / 'profile'} --virtual-time-budget=300 --screenshot={picture}"
    done = subprocess.run([CHROMIUM, *words.split(), address], capture_output=True, text=True, timeout=120, check=False)
    assert picture.exists(), done.stderr
    return np.array(Image.open(picture).convert("RGB"), dtype=float)


def share(picture: np.ndarray[Any, Any], color: int, other: int) -> float:
    """Share of the pixels in which one channel is far above another."""
    return float((picture[..., color] - picture[..., other] > 60).mean())


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_the_mesh_from_all_sides(run: Path, tmp_path: Path) -> None:
    address = write_view(run).resolve().as_uri()
    for name in ("front", "back"):
        (tmp_path / name).mkdir()
    front = screenshot(address, tmp_path / "front")
    assert share(front, 0, 2) > 0.1
    assert share(front, 2, 0) < 0.02
    back = screenshot(f"{address}#orbit=180deg 80deg 3m", tmp_path / "back")
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
