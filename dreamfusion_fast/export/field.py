"""From a field to a textured GLB, in one call."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from dreamfusion_fast.export.mesh import extract_mesh
from dreamfusion_fast.export.texture import bake, composited, save_glb, unwrap
from dreamfusion_fast.fields.base import FieldLike, evaluate, query_density


@dataclass(frozen=True)
class MeshSummary:
    """What was written."""

    vertices: int
    faces: int
    texture_size: int


def export_field(
    field: FieldLike,
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
        field: a Field, or a callable of positions [m, 3] (scene units, on the device of `aabb`) that returns
            (density [m], albedo [m, 3] in [0, 1]).
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
        >>> box = torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0, 1.0])
        >>> summary = export_field(red_ball, box, path, resolution=32, texture_size=64)
        >>> summary.faces > 100 and os.path.getsize(path) > 1000
        True
    """
    mesh = extract_mesh(
        lambda positions: query_density(field, positions),
        aabb,
        resolution=resolution,
        threshold=threshold,
        smooth_iterations=smooth_iterations,
        min_component=min_component,
        target_faces=target_faces,
    )
    voxel = float((aabb[3:] - aabb[:3]).max()) / resolution
    unwrapped = unwrap(mesh, texture_size)
    colors = composited(lambda positions: evaluate(field, positions)[:2], voxel)
    texture = bake(unwrapped, colors, texture_size, aabb.device)
    save_glb(path, unwrapped, texture)
    return MeshSummary(vertices=len(mesh.vertices), faces=len(mesh.faces), texture_size=texture_size)
