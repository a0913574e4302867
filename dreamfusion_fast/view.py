"""One page that shows a mesh: to turn by mouse or touch, without a server, a network or another file."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.io import open_run_folder, user_path, write_text

# <model-viewer> 4.4.0 as published (Apache License 2.0: licenses/model-viewer.txt); it holds three.js (MIT).
_VIEWER = Path(__file__).parent / "viewer" / "model-viewer.min.js"
_LARGEST = 256 << 20  # bytes of a file that is put into a page


def page_of(run: str | Path) -> tuple[Path, str]:
    """The page of a run or of a mesh.

    Args:
        run: a run's folder, or a GLB file.

    Returns:
        Where it belongs, view.html in the run's folder or the mesh's name with .html, and its text.

    Raises:
        UserError: there is no mesh, or it is no GLB.
    """
    path = user_path(run, "run")
    if path.suffix.lower() == ".glb" and path.is_file():
        return path.with_suffix(".html"), page(path.stem, _read(path))
    folder = open_run_folder(path, writable=False)
    if not folder.mesh.is_file():
        raise UserError(f"{folder.path} holds no {folder.mesh.name} yet: dreamfusion-fast export {folder.path}")
    turntable = _read(folder.turntable) if folder.turntable.is_file() else None
    return folder.path / "view.html", page(folder.path.resolve().name, _read(folder.mesh), turntable)


def write_view(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run or mesh, as `page_of` describes it, to its place or to `out`; return where it is."""
    place, text = page_of(run)
    path = place if out is None else user_path(out, "--out")
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another with --out") from error
    return path


def page(title: str, mesh: bytes, turntable: bytes | None = None) -> str:
    """HTML that shows a mesh.

    Args:
        title: plain text.
        mesh: a GLB file.
        turntable: an MP4 file to show below it.

    Raises:
        UserError: `mesh` is no GLB.
    """
    if mesh[:4] != b"glTF":
        raise UserError(f"{title} holds no binary glTF mesh (.glb)")
    video = ""
    if turntable is not None:
        video = f'<video controls loop muted playsinline src="data:video/mp4;base64,{_text(turntable)}"></video>'
    script = _VIEWER.read_text(encoding="utf-8")
    head, tail = _PAGE.split("@SCRIPT@")
    return (
        head.replace("@TITLE@", html.escape(title))
        .replace("@VIDEO@", video)
        .replace("@MESH@", f"data:model/gltf-binary;base64,{_text(mesh)}")
        + script
        + tail
    )


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _LARGEST:
            raise UserError(f"{path} is larger than {_LARGEST >> 20} MiB, too large for a page")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


# The viewer looks for decoders of compressed meshes on the network only when a mesh needs them, which ours do not; the
# policy forbids it all the same. #orbit=30deg 70deg 3m in the address sets the camera.
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval' blob:;
 style-src 'unsafe-inline'; img-src data: blob:; media-src data:; connect-src data: blob:; worker-src blob:">
<title>@TITLE@</title>
<style>
html, body { height: 100%; margin: 0; background: #f3f4f6; color: #1b1f24; font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.1rem; margin: 0; padding: .6rem 1rem; }
model-viewer { width: 100%; height: calc(100% - 3rem); --progress-bar-color: transparent; }
video { display: block; margin: 1rem auto; max-width: 100%; }
</style>
<h1>@TITLE@</h1>
<model-viewer alt="@TITLE@" camera-controls touch-action="pan-y" shadow-intensity="0.6" interaction-prompt="none"
 min-camera-orbit="auto 0deg auto" max-camera-orbit="auto 180deg auto" src="@MESH@"></model-viewer>
@VIDEO@
<script>
const orbit = new URLSearchParams(location.hash.slice(1)).get("orbit");
if (orbit) document.querySelector("model-viewer").setAttribute("camera-orbit", orbit);
</script>
<script type="module">@SCRIPT@</script>
</html>
"""
