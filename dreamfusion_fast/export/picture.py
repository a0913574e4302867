"""Pictures of a textured mesh, as a viewer shows it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dreamfusion_fast.export.raster import MeshView, rasterize_view
from dreamfusion_fast.export.texture import UnwrappedMesh
from dreamfusion_fast.rendering.cameras import Cameras

# Light from everywhere, and from the camera's upper right.
_AMBIENT, _DIFFUSE = 0.65, 0.45
_TO_LIGHT = np.array([0.35, 0.6, 0.72])  # in camera space: right, up, back; of unit length to 1 %
_SAMPLES = 2  # along each side of a pixel


def mesh_colors(unwrapped: UnwrappedMesh, texture: NDArray[np.uint8], seen: MeshView) -> NDArray[np.float32]:
    """Colours of the texture at the covered pixels of a view, [n_covered, 3] in [0, 1], between texels linearly."""
    uv = seen.interpolated(unwrapped.mesh.faces, unwrapped.uv)
    grid = torch.from_numpy(np.stack([2 * uv[:, 0] - 1, 1 - 2 * uv[:, 1]], -1).astype(np.float32))
    image = torch.from_numpy(texture).permute(2, 0, 1)[None].float() / 255
    sampled = torch.nn.functional.grid_sample(image, grid[None, None], padding_mode="border", align_corners=False)
    return sampled[0, :, 0].T.numpy()


def render_mesh(
    unwrapped: UnwrappedMesh,
    texture: NDArray[np.uint8],
    cameras: Cameras,
    view: int,
    size: int,
) -> NDArray[np.uint8]:
    """A picture [size, size, 3] of a mesh on white.

    Args:
        unwrapped, texture: the mesh, which has to be closed.
        cameras: on the CPU.
        view: which of them.
        size: height and width, pixels.
    """
    fine = size * _SAMPLES
    seen = rasterize_view(unwrapped.mesh, cameras, view, fine, fine, closed=True)
    picture = np.ones((fine, fine, 3), np.float32)
    colors = mesh_colors(unwrapped, texture, seen)
    normals = seen.interpolated(unwrapped.mesh.faces, unwrapped.normals)
    to_light = cameras.camera_to_world[view, :, :3].numpy() @ _TO_LIGHT
    cosine = (normals @ to_light) / np.maximum(np.linalg.norm(normals, axis=1), 1e-6)
    shade = _AMBIENT + _DIFFUSE * np.maximum(cosine, 0)[:, None]
    picture[seen.covered] = np.clip(colors * shade, 0, 1)
    # Sums of slices take a fifth of the time of a mean over two axes.
    total = np.zeros((size, size, 3), np.float32)
    for row, column in np.ndindex(_SAMPLES, _SAMPLES):
        total += picture[row::_SAMPLES, column::_SAMPLES]
    return (total * (255 / _SAMPLES**2)).round().astype(np.uint8)
