"""xatlas in a process of its own: there are meshes that make it crash, and that must not end a run.

Run as a file, this is the other process. It imports NumPy and xatlas, and nothing of this package.
"""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import xatlas
from numpy.typing import NDArray

# Of the calling process, so that the other one finds the same modules, and none in the current folder.
_PROGRAM = "import sys; sys.path[:] = {path!r}; import runpy; runpy.run_path({file!r}, run_name='__main__')"


class AtlasError(RuntimeError):
    """xatlas made no charts of a mesh; the message says how it ended."""


def make_atlas(
    vertices: NDArray[np.float32], faces: NDArray[np.int64], normals: NDArray[np.float32], size: int, padding: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Cut a mesh into charts and pack them into a square.

    Args:
        vertices: `[n, 3]`.
        faces: `[m, 3]`.
        normals: `[n, 3]`, of the vertices.
        size, padding: texels of the texture along a side, and between charts.

    Returns:
        For each vertex of the charts which one of the mesh it is, `[k]`; the faces of these, `[m, 3]`; and their
        places, about [0, 1], `[k, 2]`.

    Raises:
        AtlasError: it crashed, or refused the mesh.
    """
    given = io.BytesIO()
    np.savez(given, vertices=vertices, faces=faces.astype(np.uint32), normals=normals, options=[size, padding])
    program = _PROGRAM.format(path=sys.path, file=str(Path(__file__)))
    # A session of its own: Ctrl-C reaches this process alone, which then ends the other one.
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=given.getvalue(),
        capture_output=True,
        start_new_session=True,
        check=False,
    )
    if done.returncode < 0:
        raise AtlasError(signal.strsignal(-done.returncode) or f"signal {-done.returncode}")
    if done.returncode > 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise AtlasError(said[-1] if said else f"exit code {done.returncode}")
    with np.load(io.BytesIO(done.stdout), allow_pickle=False) as made:
        return made["origin"].astype(np.int64), made["faces"].astype(np.int64), made["uv"].astype(np.float32)


def _main() -> None:
    with np.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False) as given:
        vertices, faces, normals, options = (given[name] for name in ("vertices", "faces", "normals", "options"))
    atlas = xatlas.Atlas()
    atlas.add_mesh(vertices, faces, normals)
    charts = xatlas.ChartOptions()
    charts.max_iterations = 1  # more move the seams a little, at twice the time
    pack = xatlas.PackOptions()
    pack.resolution, pack.padding = (int(option) for option in options)
    pack.bilinear = True
    atlas.generate(charts, pack)
    origin, cut, uv = atlas[0]
    made = io.BytesIO()
    np.savez(made, origin=origin, faces=cut, uv=uv)
    sys.stdout.buffer.write(made.getvalue())


if __name__ == "__main__":
    _main()
