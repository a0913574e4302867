"""From a mesh and a colour field to a GLB with a texture."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.ndimage
import torch
import trimesh
import xatlas
from numpy.typing import NDArray
from PIL import Image

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.export.mesh import Mesh
from dreamfusion_fast.io import write_bytes

AlbedoFn = Callable[[torch.Tensor], torch.Tensor]
SurfaceColorFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
FieldFn = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class UnwrappedMesh:
    """A mesh cut along seams, so that every vertex has one place in the texture."""

    mesh: Mesh
    normals: NDArray[np.float32]
    """[n_vertices, 3], outward, unit length, of the mesh before the cut: shading shows no seam."""
    uv: NDArray[np.float32]
    """[n_vertices, 2] in [0, 1], u to the right and v upward from the lower left corner of the texture."""


def unwrap(mesh: Mesh, texture_size: int = 1024, padding: int = 4) -> UnwrappedMesh:
    """Cut a mesh into charts and pack them into a square, with `padding` texels of a `texture_size` texture between."""
    if len(mesh.faces) == 0:
        raise UserError("the mesh has no faces; export with a lower --threshold")
    normals = mesh.vertex_normals()
    atlas = xatlas.Atlas()
    atlas.add_mesh(mesh.vertices, mesh.faces.astype(np.uint32), normals)
    charts = xatlas.ChartOptions()
    charts.max_iterations = 1  # more move the seams a little, at twice the time
    pack = xatlas.PackOptions()
    pack.resolution = texture_size
    pack.padding = padding
    pack.bilinear = True
    atlas.generate(charts, pack)
    origin, faces, uv = atlas[0]
    return UnwrappedMesh(
        Mesh(mesh.vertices[origin], faces.astype(np.int64)), normals[origin], np.clip(uv, 0, 1).astype(np.float32)
    )


def rasterize(
    uv: NDArray[np.float32], faces: NDArray[np.int64], height: int, width: int, chunk: int = 1 << 22
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Find for each texel the face that covers its centre, and where in the face.

    Row 0 is the top of the texture (v = 1); the centre of texel (row, column) is at u = (column + 0.5) / width,
    v = 1 - (row + 0.5) / height. A texel on a shared edge belongs to the face of the higher index.

    Args:
        uv: [n_vertices, 2].
        faces: [n_faces, 3].
        height, width: of the texture.
        chunk: most texel and face pairs tested at a time.

    Returns:
        Face index [height, width], -1 where there is none, and barycentric coordinates [height, width, 3].
    """
    points = np.stack([uv[:, 0] * width - 0.5, (1 - uv[:, 1]) * height - 0.5], -1).astype(np.float64)[faces]
    size = np.array([width, height])
    low = np.clip(np.ceil(points.min(1) - 1e-6), 0, size).astype(np.int64)
    high = np.clip(np.floor(points.max(1) + 1e-6) + 1, 0, size).astype(np.int64)
    extent = np.maximum(high - low, 0)
    count = extent[:, 0] * extent[:, 1]
    a, ab, ac = points[:, 0], points[:, 1] - points[:, 0], points[:, 2] - points[:, 0]
    area = ab[:, 0] * ac[:, 1] - ab[:, 1] * ac[:, 0]
    count[np.abs(area) < 1e-12] = 0

    index = np.full(height * width, -1, np.int64)
    weights = np.zeros((height * width, 3), np.float32)
    ends = np.cumsum(count)
    start = 0
    while start < len(faces):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + chunk, side="right")))
        # One row per pair of a face and a texel of its bounding box.
        face = np.repeat(np.arange(start, stop), count[start:stop])
        within = np.arange(len(face)) - np.repeat(ends[start:stop] - count[start:stop] - done, count[start:stop])
        column = low[face, 0] + within % extent[face, 0]
        row = low[face, 1] + within // extent[face, 0]
        x, y = column - a[face, 0], row - a[face, 1]
        second = (x * ac[face, 1] - y * ac[face, 0]) / area[face]
        third = (y * ab[face, 0] - x * ab[face, 1]) / area[face]
        first = 1 - second - third
        inside = (first >= -1e-6) & (second >= -1e-6) & (third >= -1e-6)
        texel = (row * width + column)[inside]
        index[texel] = face[inside]
        weights[texel] = np.stack([first, second, third], -1)[inside]
        start = stop
    # Where texels were written twice, both arrays keep the last write of the same order.
    return index.reshape(height, width), weights.reshape(height, width, 3)


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
    index, weights = rasterize(unwrapped.uv, unwrapped.mesh.faces, size, size)
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


def at_surface(albedo_fn: AlbedoFn) -> SurfaceColorFn:
    """The colour exactly at the surface: positions [m, 3] to albedo [m, 3], whatever the normal."""
    return lambda positions, normals: albedo_fn(positions)


def composited(field_fn: FieldFn, step: float, outside: float = 1.0, samples: int = 4) -> SurfaceColorFn:
    """The colour a ray that enters along the normal collects around the surface.

    A soft field shows the colour of where light is absorbed, some way below the mesh; exactly at the mesh, where the
    density is low, its albedo is hardly trained.

    Args:
        field_fn: positions [m, 3] to (density [m], albedo [m, 3]).
        step: distance between samples, scene units; about one cell of the grid that the mesh came from.
        outside: steps outside the surface at which the ray starts.
        samples: samples per ray, in the middle of each step.
    """

    def color_fn(positions: torch.Tensor, normals: torch.Tensor) -> torch.Tensor:
        distance = (outside - 0.5 - torch.arange(samples, device=positions.device)) * step
        points = positions[:, None] + normals[:, None] * distance[None, :, None]
        density, albedo = field_fn(points.reshape(-1, 3))
        optical = density.reshape(-1, samples).float() * step
        before = optical.cumsum(1) - optical
        weights = torch.exp(-before) * -torch.expm1(-optical)
        total = weights.sum(1, keepdim=True)
        # A ray that meets nothing takes the plain mean.
        weights = torch.where(total > 1e-6, weights / total.clamp_min(1e-6), torch.full_like(weights, 1 / samples))
        return (weights[:, :, None] * albedo.reshape(-1, samples, 3)).sum(1)

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
