"""Draw GLB files as a viewer shows them, side by side: what is in the files, not what they were made from.

    python tools/mesh_sheet.py out/*/mesh.glb --out sheet.png
    python tools/mesh_sheet.py before/*.glb --columns 4 --views 2 --out before.png

Each mesh is loaded from its file by trimesh and drawn with its texture and a light beside the camera, from azimuths
that begin at the front; its name, the file's or that of the folder around a mesh.glb, is written above it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dreamfusion_fast.export import Mesh, UnwrappedMesh, render_mesh, save_png, tile
from dreamfusion_fast.rendering import orbit_cameras


def load(path: Path) -> tuple[UnwrappedMesh, NDArray[np.uint8]]:
    """Mesh and texture [height, width, 3] of a GLB."""
    loaded = trimesh.load(path, force="mesh", process=False)
    mesh = Mesh(np.asarray(loaded.vertices, np.float32), np.asarray(loaded.faces, np.int64))
    normals = np.asarray(loaded.vertex_normals, np.float32)
    uv = np.asarray(loaded.visual.uv, np.float32)
    return UnwrappedMesh(mesh, normals, uv), np.array(loaded.visual.material.baseColorTexture.convert("RGB"))


def cell(path: Path, views: int, size: int) -> NDArray[np.uint8]:
    """Views of one mesh from the front on, [size + 14, views * size, 3]."""
    mesh, texture = load(path)
    cameras = orbit_cameras(8, elevation_deg=15.0)
    pictures = np.concatenate([render_mesh(mesh, texture, cameras, view, size) for view in range(views)], axis=1)
    image = Image.fromarray(np.pad(pictures, ((14, 0), (0, 0), (0, 0)), constant_values=255))
    name = path.parent.name if path.stem == "mesh" else path.stem
    ImageDraw.Draw(image).text((3, 1), name.replace("_", " "), fill=(60, 60, 60))
    return np.array(image)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("meshes", type=Path, nargs="+")
    parser.add_argument("--views", type=int, default=2, help="of each mesh, 45 degrees apart")
    parser.add_argument("--size", type=int, default=112, help="height and width of a view, pixels")
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    save_png(args.out, tile([cell(path, args.views, args.size) for path in args.meshes], args.columns))


if __name__ == "__main__":
    main()
