"""From a mesh and a colour field to a GLB with a texture."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.ndimage
import torch
import trimesh
from numpy.typing import NDArray
from PIL import Image

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.export.atlas import AtlasError, make_atlas
from dreamfusion_fast.export.mesh import Mesh, decimate
from dreamfusion_fast.export.raster import rasterize_texture
from dreamfusion_fast.fields.base import evaluate
from dreamfusion_fast.fields.samples import FieldSamples
from dreamfusion_fast.io import write_bytes
from dreamfusion_fast.rendering.rays import Rays
from dreamfusion_fast.rendering.volume.renderer import VolumeRenderer

_log = logging.getLogger(__name__)

SurfaceColorFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Voxels outside the surface at which a ray that asks for its colour begins: more than smoothing and decimation move it,
# and less than a gap of two cells. Below the other number a ray has met nothing.
_OUTSIDE = 1.5
_MISSED = 1e-3
LOOK_INTO = 16.0
"""Length of such a ray, in voxels."""
# A mesh with fewer faces than this is not simplified further for xatlas.
_FEWEST_FACES = 1000


@dataclass(frozen=True)
class UnwrappedMesh:
    """A mesh cut along seams, so that every vertex has one place in the texture."""

    mesh: Mesh
    normals: NDArray[np.float32]
    """[n_vertices, 3], outward, unit length, of the mesh before the cut: shading shows no seam."""
    uv: NDArray[np.float32]
    """[n_vertices, 2] in [0, 1], u to the right and v upward from the lower left corner of the texture."""


def unwrap(mesh: Mesh, texture_size: int = 1024, padding: int = 4) -> UnwrappedMesh:
    """Cut a mesh into charts and pack them into a square, with `padding` texels of a `texture_size` texture between.

    Of a mesh that xatlas cannot cut, one with half as many faces is tried, and so on, with a warning.

    Raises:
        UserError: there are no faces, or not even few of them can be cut.
    """
    if len(mesh.faces) == 0:
        raise UserError("the mesh has no faces; export with a lower --threshold")
    while True:
        normals = mesh.vertex_normals()
        try:
            origin, faces, uv = make_atlas(mesh.vertices, mesh.faces, normals, texture_size, padding)
        except AtlasError as error:
            n_faces = len(mesh.faces)
            if n_faces < _FEWEST_FACES:
                raise UserError(
                    f"xatlas cannot cut the mesh into charts ({error}); export with other settings"
                ) from error
            mesh = decimate(mesh, n_faces // 2)
            _log.warning(
                "xatlas cannot cut %d faces into charts (%s); going on with %d", n_faces, error, len(mesh.faces)
            )
        else:
            return UnwrappedMesh(Mesh(mesh.vertices[origin], faces), normals[origin], np.clip(uv, 0, 1))


def bake(
    unwrapped: UnwrappedMesh,
    color_fn: SurfaceColorFn,
    size: int,
    device: torch.device | str = "cpu",
    chunk: int = 1 << 17,
) -> NDArray[np.uint8]:
    """Evaluate colours at the surface point of every texel.

    Args:
        unwrapped: mesh with texture coordinates.
        color_fn: (positions [m, 3], outward unit normals [m, 3]) to colours [m, 3], display values in [0, 1].
        size: height and width of the texture.
        device: device that color_fn's arguments are on.
        chunk: positions handed to color_fn at a time.

    Returns:
        [size, size, 3], row 0 at the top. Texels that no face covers take the colour of the nearest covered one, so
        neither filtering nor smaller mip levels mix in a foreign colour.
    """
    index, weights = rasterize_texture(unwrapped.uv, unwrapped.mesh.faces, size, size)
    covered = index >= 0
    if not covered.any():
        raise UserError(f"no face covers a texel of a {size} x {size} texture; export with a larger --texture-size")
    corners, coordinates = unwrapped.mesh.faces[index[covered]], weights[covered][:, :, None]
    positions = torch.from_numpy((unwrapped.mesh.vertices[corners] * coordinates).sum(1, dtype=np.float32))
    normals = torch.nn.functional.normalize(
        torch.from_numpy((unwrapped.normals[corners] * coordinates).sum(1, dtype=np.float32)), dim=-1
    )
    colors = torch.empty(len(positions), 3)
    with torch.no_grad():
        for part in range(0, len(positions), chunk):
            piece = slice(part, part + chunk)
            colors[piece] = color_fn(positions[piece].to(device), normals[piece].to(device)).float().cpu()
    texture = np.zeros((size, size, 3), np.uint8)
    texture[covered] = colors.nan_to_num(0).clamp(0, 1).mul(255).round().byte().numpy()
    nearest = scipy.ndimage.distance_transform_edt(~covered, return_distances=False, return_indices=True)
    return texture[nearest[0], nearest[1]]


def seen_colors(renderer: VolumeRenderer, voxel: float) -> SurfaceColorFn:
    """The colours that a renderer shows to who looks straight at a surface.

    A ray enters along the normal and collects colour until no light is left, or until it is `LOOK_INTO` voxels long. So
    a soft field shows the colour of where its light is absorbed, which lies some way below the mesh, and a thin part
    its own colour and not that of what is far behind it.

    Args:
        renderer: of the field, for rays of that length; its step should not be longer than a voxel.
        voxel: of the grid that the mesh came from, scene units.
    """

    def color_fn(positions: torch.Tensor, normals: torch.Tensor) -> torch.Tensor:
        up = torch.tensor([0.0, 1.0, 0.0], device=normals.device)  # where the faces around have no common side
        normals = torch.where(normals.norm(dim=1, keepdim=True) > 0.5, normals, up)
        output = renderer.render(Rays(positions + _OUTSIDE * voxel * normals, -normals))
        seen = output.color / output.opacity.clamp_min(1e-6)[:, None]
        missed = output.opacity < _MISSED
        if missed.any():  # too little is absorbed to have a colour: what the field says at the place itself
            index = torch.arange(int(missed.sum()), device=positions.device)
            there = FieldSamples(positions[missed], -normals[missed], index)
            seen[missed] = evaluate(renderer.field, there).color.to(seen.dtype)
        return seen

    return color_fn


def save_glb(path: str | os.PathLike[str], unwrapped: UnwrappedMesh, texture: NDArray[np.uint8]) -> None:
    """Write a binary glTF: y up, front towards +z, one rough non-metallic material, the texture as sRGB PNG as it is.

    Args:
        path: file to write, whole or not at all.
        unwrapped: mesh with texture coordinates.
        texture: [height, width, 3], row 0 at the top.
    """
    material = trimesh.visual.material.PBRMaterial(
        baseColorTexture=Image.fromarray(texture), metallicFactor=0.0, roughnessFactor=0.95
    )
    mesh = trimesh.Trimesh(
        vertices=unwrapped.mesh.vertices,
        faces=unwrapped.mesh.faces,
        vertex_normals=unwrapped.normals,
        visual=trimesh.visual.TextureVisuals(uv=unwrapped.uv, material=material),
        process=False,
    )
    data: Any = trimesh.Scene(mesh).export(file_type="glb", include_normals=True)
    write_bytes(path, data)
