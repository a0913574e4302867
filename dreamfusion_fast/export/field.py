"""From a field to a textured GLB, in one call."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from dreamfusion_fast.export.agreement import Agreement, measure_agreement
from dreamfusion_fast.export.density import sample_density
from dreamfusion_fast.export.surface import extract_mesh
from dreamfusion_fast.export.texture import LOOK_INTO, UnwrappedMesh, bake, save_glb, seen_colors, unwrap
from dreamfusion_fast.fields.base import FieldLike, evaluate, query_density
from dreamfusion_fast.rendering.config import RendererConfig
from dreamfusion_fast.rendering.volume.renderer import VolumeRenderer


@dataclass(frozen=True, eq=False)
class TexturedMesh:
    """A mesh with its texture, as it was written, and how far it shows what the render shows."""

    unwrapped: UnwrappedMesh
    texture: NDArray[np.uint8]
    """[height, width, 3], row 0 at the top."""
    agreement: Agreement

    @property
    def faces(self) -> int:
        """Number of triangles."""
        return len(self.unwrapped.mesh.faces)


def export_field(
    field: FieldLike,
    aabb: torch.Tensor,
    path: str | os.PathLike[str],
    *,
    resolution: int = 128,
    threshold: float | None = None,
    smooth_iterations: int = 5,
    min_component: float = 0.005,
    target_faces: int = 20_000,
    texture_size: int = 1024,
    renderer: VolumeRenderer | None = None,
) -> TexturedMesh:
    """Extract the surface of a field, bake its colour into a texture and write both as GLB, whole or not at all.

    Args:
        field: a Field, or a callable of positions [m, 3] (scene units, on the device of `aabb`) that returns
            (density [m], albedo [m, 3] in [0, 1]).
        aabb: [6], (xmin, ymin, zmin, xmax, ymax, zmax), the field's box or a part of it.
        path: file to write.
        resolution: cells along the longest side of the box.
        threshold, smooth_iterations, min_component, target_faces: see extract_mesh.
        texture_size: height and width of the texture, texels.
        renderer: whose pictures of the field the mesh is compared with; by default one that samples wherever the
            density, as sampled for the mesh, is not zero.

    Raises:
        UserError: there is no surface; the message says what to try.

    Example:
        >>> import os, tempfile, torch
        >>> def red_ball(positions):
        ...     density = 100 * (positions.norm(dim=-1) < 0.5).float()
        ...     return density, torch.tensor([1.0, 0.0, 0.0]).expand(len(positions), 3)
        >>> path = os.path.join(tempfile.mkdtemp(), "ball.glb")
        >>> box = torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0, 1.0])
        >>> mesh = export_field(red_ball, box, path, resolution=32, texture_size=64)
        >>> mesh.faces > 100 and os.path.getsize(path) > 1000
        True
        >>> mesh.agreement.iou > 0.9 and mesh.agreement.covered > 0.98
        True
    """
    grid = sample_density(lambda positions: query_density(field, positions), aabb, resolution)
    mesh = extract_mesh(
        grid,
        threshold=threshold,
        smooth_iterations=smooth_iterations,
        min_component=min_component,
        target_faces=target_faces,
    )
    unwrapped = unwrap(mesh, texture_size)
    box = getattr(field, "aabb", None)
    if box is not None and not torch.equal(torch.as_tensor(box).cpu().double(), aabb.cpu().double()):
        field = partial(evaluate, field)  # has no box of its own, so that a renderer does not mind if `aabb` cuts it
    close = VolumeRenderer(field, grid.occupancy, RendererConfig(step=grid.voxel, far=LOOK_INTO * grid.voxel))
    texture = bake(unwrapped, seen_colors(close, grid.voxel), texture_size, aabb.device)
    save_glb(path, unwrapped, texture)
    if renderer is None:
        renderer = VolumeRenderer(field, grid.occupancy, RendererConfig(step=grid.voxel))
    agreement = measure_agreement(renderer, unwrapped, texture)
    return TexturedMesh(unwrapped, texture, agreement)
