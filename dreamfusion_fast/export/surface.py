"""From a density to a closed triangle mesh."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.measure import marching_cubes

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.export.density import DensityGrid
from dreamfusion_fast.export.mesh import (
    Mesh,
    components,
    decimate,
    keep_faces,
    keep_large_components,
    outward,
    smooth,
    without_degenerate,
)
from dreamfusion_fast.export.raster import rasterize_view
from dreamfusion_fast.export.seen import seen_distance, threshold_advice
from dreamfusion_fast.export.views import rings

# Elevation in degrees and number of the views of which one at least has to see a piece, and their height and width.
_VISIBLE_FROM = ((-60.0, 5), (-15.0, 8), (15.0, 8), (60.0, 5))
_VISIBLE_SIZE = 192


def extract_mesh(
    grid: DensityGrid,
    *,
    threshold: float | None = None,
    smooth_iterations: int = 5,
    min_component: float = 0.005,
    target_faces: int = 20_000,
) -> Mesh:
    """Extract the surface of a density, from `sample_density`, as a closed, cleaned and decimated mesh.

    Marching cubes on a grid that is padded with emptiness, so the surface closes where the object leaves the box; then
    small separate pieces, inner cavities and what nobody can see from outside are dropped, the surface is smoothed and
    decimated.

    Args:
        grid: the density.
        threshold: density at the surface, per scene unit; None: the surface that is seen (`seen_distance`).
        smooth_iterations: Taubin smoothing steps; 0 for none.
        min_component: pieces whose area is smaller than this fraction of the largest piece's are dropped.
        target_faces: faces after decimation; 0 keeps all.

    Raises:
        UserError: the density never exceeds the threshold, is nowhere opaque, or is not finite; the message says what
            to try.
    """
    density = grid.values
    largest = float(density.max())
    if not np.isfinite(density).all():
        raise UserError("the field's density is not finite, so there is no surface; export from an earlier checkpoint")
    if threshold is None:
        inside = seen_distance(grid) / grid.voxel
        if not (inside > 0).any():
            raise UserError(
                "there is no surface: what is opaque from some sides is see-through from others, or thinner than a "
                "cell; export with a higher --resolution, or with a --threshold"
            )
    elif largest > threshold:
        # Densities far above the threshold are cut off, so that a very dense sample does not push the surface all the
        # way to its empty neighbour: a hard surface lies half-way between the two, a soft one where it is.
        inside = density / threshold - 1
    else:
        raise UserError(
            f"there is no surface: the density never exceeds the threshold {threshold:.4g} (its largest value is "
            f"{largest:.4g}); {threshold_advice(largest)}"
        )
    mesh = keep_visible(keep_large_components(_zero_surface(inside, grid), min_component))
    if smooth_iterations:
        mesh = smooth(mesh, smooth_iterations)
    if target_faces and len(mesh.faces) > target_faces:
        mesh = decimate(mesh, target_faces)
    mesh = Mesh(np.clip(mesh.vertices, grid.low, grid.high).astype(np.float32), mesh.faces)
    return outward(without_degenerate(mesh))


def keep_visible(mesh: Mesh) -> Mesh:
    """Drop connected pieces that cannot be seen from any side, such as what is inside another piece."""
    piece = components(mesh)
    if not len(piece) or not piece.any():
        return mesh
    low, high = mesh.vertices.min(0), mesh.vertices.max(0)
    radius = float(np.linalg.norm(high - low)) / 2
    cameras = rings(_VISIBLE_FROM, torch.from_numpy((low + high) / 2), radius)
    seen = np.zeros(piece.max() + 1, bool)
    for view in range(len(cameras)):
        raster = rasterize_view(mesh, cameras, view, _VISIBLE_SIZE, _VISIBLE_SIZE, closed=True)
        seen[piece[raster.face[raster.covered]]] = True
    return keep_faces(mesh, seen[piece])


def _zero_surface(inside: NDArray[np.floating], grid: DensityGrid) -> Mesh:
    """Marching cubes at zero of values that are positive inside, closed at the end of the grid."""
    bounded = np.pad(np.clip(inside, -1, 1), 1, constant_values=-1)
    vertices, faces, _, _ = marching_cubes(bounded.astype(np.float32), 0.0)
    # One step of padding lies outside the box: what was interpolated towards it is put back onto the box.
    vertices = np.clip(vertices - 1, 0, np.array(inside.shape) - 1) * grid.voxel + grid.low
    return outward(without_degenerate(Mesh(vertices.astype(np.float32), faces.astype(np.int64))))
