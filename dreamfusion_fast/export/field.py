"""From a field to a textured GLB, in one call."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from dreamfusion_fast.export.mesh import extract_mesh
from dreamfusion_fast.export.texture import FieldFn, bake, composited, save_glb, unwrap


@dataclass(frozen=True)
class MeshSummary:
    """What was written."""

    vertices: int
    faces: int
    texture_size: int


def export_field(
    field_fn: FieldFn,
    aabb: torch.Tensor,
    path: str | os.PathLike[str],
    *,
    resolution: int = 128,
    threshold: float | None = None,
    smooth_iterations: int = 5,
    min_component: float = 0.02,
    target_faces: int = 20_000,
    texture_size: int = 1024,
) -> MeshSummary:
    """Extract the surface of a field, bake its colour into a texture and write both as GLB, whole or not at all.

    Args:
        field_fn: positions [m, 3] (scene units, on the device of `aabb`) to (density [m], albedo [m, 3] in [0, 1]).
        aabb: [6], (xmin, ymin, zmin, xmax, ymax, zmax).
        path: file to write.
        resolution, threshold, smooth_iterations, min_component, target_faces: see extract_mesh.
        texture_size: height and width of the texture, texels.

    Raises:
        UserError: there is no surface; the message says what to try.

    Example:
        >>> import os, tempfile, torch
        >>> def red_ball(positions):
        ...     density = 100 * (positions.norm(dim=-1) < 0.5).float()
        ...     return density, torch.tensor([1.0, 0.0, 0.0]).expand(len(positions), 3)
        >>> path = os.path.join(tempfile.mkdtemp(), "ball.glb")
        >>> export_field(red_ball, torch.tensor([-1.0, -1, -1, 1, 1, 1]), path, resolution=32, texture_size=64).faces >
        100 True
    """
    mesh = extract_mesh(
        lambda positions: field_fn(positions)[0],
        aabb,
        resolution=resolution,
        threshold=threshold,
        smooth_iterations=smooth_iterations,
        min_component=min_component,
        target_faces=target_faces,
    )
    voxel = float((aabb[3:] - aabb[:3]).max()) / resolution
    unwrapped = unwrap(mesh, texture_size)
    texture = bake(unwrapped, composited(field_fn, voxel), texture_size, aabb.device)
    save_glb(path, unwrapped, texture)
    return MeshSummary(vertices=len(mesh.vertices), faces=len(mesh.faces), texture_size=texture_size)
