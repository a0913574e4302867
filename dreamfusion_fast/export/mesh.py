"""From a density to a closed triangle mesh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import fast_simplification
import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from skimage.measure import marching_cubes

from dreamfusion_fast.errors import UserError

DensityFn = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Mesh:
    """Triangles in scene units, counter-clockwise seen from outside."""

    vertices: NDArray[np.float32]
    """[n_vertices, 3]."""
    faces: NDArray[np.int64]
    """[n_faces, 3], indices into vertices."""

    @property
    def corners(self) -> NDArray[np.float32]:
        """[n_faces, 3, 3]: face, corner, coordinate."""
        return self.vertices[self.faces]

    def face_normals(self) -> NDArray[np.float32]:
        """[n_faces, 3], outward, with the length of twice the face's area."""
        a, b, c = np.moveaxis(self.corners, 1, 0)
        return np.cross(b - a, c - a)

    def vertex_normals(self) -> NDArray[np.float32]:
        """[n_vertices, 3], outward, unit length: the mean over the faces around, weighted by area."""
        total = np.zeros(self.vertices.shape, np.float64)
        normals = self.face_normals()
        for corner in range(3):
            for axis in range(3):
                total[:, axis] += np.bincount(self.faces[:, corner], normals[:, axis], len(self.vertices))
        length = np.linalg.norm(total, axis=1, keepdims=True)
        up = np.array([0.0, 1.0, 0.0])  # any unit vector, for the vertex of degenerate faces only
        return np.where(length > 0, total / np.maximum(length, 1e-300), up).astype(np.float32)


def extract_mesh(
    density_fn: DensityFn,
    aabb: torch.Tensor,
    *,
    resolution: int = 128,
    threshold: float | None = None,
    smooth_iterations: int = 5,
    min_component: float = 0.02,
    target_faces: int = 20_000,
    chunk: int = 1 << 18,
) -> Mesh:
    """Extract the surface of a density field as a closed, cleaned and decimated mesh.

    Marching cubes on a grid that is padded with emptiness, so the surface closes where the object leaves the box; then
    small separate pieces and inner cavities are dropped, the surface is smoothed and decimated.

    Args:
        density_fn: positions [m, 3] (scene units, float32, on the device of `aabb`) to densities [m].
        aabb: [6], (xmin, ymin, zmin, xmax, ymax, zmax).
        resolution: cells along the longest side of the box.
        threshold: density at the surface, per scene unit; None chooses it with automatic_threshold.
        smooth_iterations: Taubin smoothing steps; 0 for none.
        min_component: pieces whose area is smaller than this fraction of the largest piece's are dropped.
        target_faces: faces after decimation; 0 keeps all.
        chunk: positions handed to density_fn at a time.

    Raises:
        UserError: the density never exceeds the threshold, or is not finite; the message says what to try.
    """
    low, voxel, density = sample_density(density_fn, aabb, resolution, chunk)
    largest = float(density.max())
    if not np.isfinite(density).all():
        raise UserError("the field's density is not finite, so there is no surface; export from an earlier checkpoint")
    if threshold is None:
        threshold = automatic_threshold(density, voxel)
    if largest <= threshold:
        raise UserError(
            f"there is no surface: the density never exceeds the threshold {threshold:.4g} (its largest value is "
            f"{largest:.4g}); export with a lower --threshold, such as {largest / 2:.2g}, or train longer"
        )
    high = low + voxel * (np.array(density.shape) - 1)
    mesh = _marching_cubes(density, threshold, low, voxel)
    mesh = keep_large_components(mesh, min_component)
    if smooth_iterations:
        mesh = smooth(mesh, smooth_iterations)
    if target_faces and len(mesh.faces) > target_faces:
        mesh = decimate(mesh, target_faces)
    mesh = Mesh(np.clip(mesh.vertices, low, high).astype(np.float32), mesh.faces)
    return _outward(_without_degenerate(mesh))


def sample_density(
    density_fn: DensityFn, aabb: torch.Tensor, resolution: int, chunk: int = 1 << 18
) -> tuple[NDArray[np.float64], float, NDArray[np.float32]]:
    """Evaluate a density at the points of a cubic grid that spans the box.

    Returns:
        The grid's lowest corner [3], the distance between points, and the densities [nx, ny, nz]. The box's longest
        side has `resolution` + 1 points; a shorter side that is no multiple of the distance is overshot, centred.
    """
    if aabb.shape != (6,):
        raise ValueError(f"aabb has to have shape [6], not {list(aabb.shape)}")
    if resolution < 2:
        raise ValueError(f"resolution has to be at least 2, not {resolution}")
    box = aabb.detach().cpu().double().numpy()
    extent = box[3:] - box[:3]
    if not (extent > 0).all():
        raise ValueError(f"aabb has to have its lower corner first, not {box.tolist()}")
    voxel = float(extent.max()) / resolution
    cells = np.ceil(extent / voxel - 1e-6).astype(int)
    low = box[:3] + (extent - cells * voxel) / 2
    axes = [torch.as_tensor(low[i] + voxel * np.arange(cells[i] + 1), dtype=torch.float32) for i in range(3)]
    shape = tuple(len(axis) for axis in axes)
    density = np.empty(int(np.prod(shape)), np.float32)
    with torch.no_grad():
        for start in range(0, density.size, chunk):
            index = torch.arange(start, min(start + chunk, density.size))
            x, rest = index // (shape[1] * shape[2]), index % (shape[1] * shape[2])
            positions = torch.stack([axes[0][x], axes[1][rest // shape[2]], axes[2][rest % shape[2]]], dim=-1)
            values = density_fn(positions.to(aabb.device))
            density[start : start + len(index)] = values.reshape(-1).float().cpu().numpy()
    return low, voxel, density.reshape(shape)


# Share of the light that what a person sees has absorbed. At a half, legs of an armchair that its render shows were
# lost; at 0.15 they are there.
_SEEN = 0.15


def automatic_threshold(density: NDArray[np.float32], voxel: float) -> float:
    """Choose the density at the surface so that the mesh lies where the renderer shows the object.

    Seen from both ends of each of the three axes, the renderer shows a surface where 15 % of the light is absorbed, and
    a mesh cut at a threshold begins where the density first exceeds it. Of a logarithmic range of thresholds, take the
    one whose depths differ least, summed over all pixels of the six views; a difference counts up to 4 cells, and so
    does a pixel where one shows something and the other nothing, so outline and depth both matter. Where many
    thresholds do equally well, as for a hard surface, it is the middle one.

    Args:
        density: [nx, ny, nz].
        voxel: distance between grid points, scene units.

    Raises:
        UserError: no pixel is opaque along any axis.
    """
    stride = -(-max(density.shape) // 100)  # enough for one number, and quick for any grid
    coarse = np.maximum(density[::stride, ::stride, ::stride], 0)
    seen = -np.log(1 - _SEEN) / (voxel * stride)
    largest = float(coarse.max())
    candidates = np.geomspace(1e-3, 0.9, 60) * largest
    cost = np.zeros(len(candidates))
    opaque = 0
    for axis in range(3):
        along = np.ascontiguousarray(np.moveaxis(coarse, axis, 2))
        for view in (along, np.ascontiguousarray(along[:, :, ::-1])):
            absorbed = np.cumsum(view, axis=2)
            shown = absorbed[:, :, -1] > seen
            opaque += int(shown.sum())
            # Cell k spans k - 0.5 to k + 0.5; the surface lies a fraction of the way through the first that passes it.
            first = (absorbed > seen).argmax(2)[:, :, None]
            excess = np.take_along_axis(absorbed, first, 2) - seen
            depth = (first + 0.5 - excess / np.maximum(np.take_along_axis(view, first, 2), 1e-30))[:, :, 0]
            for index, candidate in enumerate(candidates):
                inside = view > candidate
                crossing = inside.argmax(2)
                covered = np.take_along_axis(inside, crossing[:, :, None], 2)[:, :, 0]
                difference = np.minimum(np.abs(crossing - 0.5 - depth), 4)
                cost[index] += difference[shown & covered].sum() + 4 * np.count_nonzero(shown ^ covered)
    if not opaque:
        raise UserError(
            f"there is no surface: the field is nowhere opaque (its largest density is {largest:.4g}); "
            f"export with a --threshold, such as {largest / 2:.2g}, or train longer"
        )
    good = np.flatnonzero(cost <= cost.min() + 0.02 * opaque)
    return float(np.sqrt(candidates[good[0]] * candidates[good[-1]]))


def keep_large_components(mesh: Mesh, min_component: float) -> Mesh:
    """Drop connected pieces with less than `min_component` of the largest one's area, and the walls of cavities."""
    n = len(mesh.vertices)
    edges = (np.ones(2 * len(mesh.faces)), (mesh.faces[:, [0, 1]].ravel("F"), mesh.faces[:, [1, 2]].ravel("F")))
    count, label = scipy.sparse.csgraph.connected_components(scipy.sparse.coo_matrix(edges, (n, n)), directed=False)
    face_label = label[mesh.faces[:, 0]]
    normals = mesh.face_normals()
    area = np.bincount(face_label, np.linalg.norm(normals, axis=1) / 2, count)
    # Signed volume, from the divergence theorem; a cavity's surface points into the cavity, so its volume is negative.
    volume = np.bincount(face_label, np.einsum("ij,ij->i", mesh.corners.mean(1), normals) / 6, count)
    solid = volume > 0
    if not solid.any():
        solid[:] = True
    keep = solid & (area >= min_component * area[solid].max())
    return _compact(mesh.vertices, mesh.faces[keep[face_label]])


def smooth(mesh: Mesh, iterations: int) -> Mesh:
    """Taubin smoothing (Taubin 1995): each iteration shrinks by 0.5 and swells by 0.53 of the umbrella Laplacian."""
    n = len(mesh.vertices)
    a, b = mesh.faces.ravel(), np.roll(mesh.faces, -1, axis=1).ravel()
    neighbours = scipy.sparse.csr_matrix((np.ones(2 * len(a)), (np.r_[a, b], np.r_[b, a])), (n, n))
    neighbours.data[:] = 1  # an edge of two faces counts once
    mean = scipy.sparse.diags(1 / np.maximum(np.asarray(neighbours.sum(1)).ravel(), 1)) @ neighbours
    vertices = mesh.vertices.astype(np.float64)
    for _ in range(iterations):
        for factor in (0.5, -0.53):
            vertices = vertices + factor * (mean @ vertices - vertices)
    return Mesh(vertices.astype(np.float32), mesh.faces)


def decimate(mesh: Mesh, target_faces: int) -> Mesh:
    """Reduce to about `target_faces` faces by edge collapses of least quadric error (Garland and Heckbert 1997)."""
    vertices, faces = fast_simplification.simplify(
        mesh.vertices.astype(np.float32), mesh.faces.astype(np.int32), target_count=target_faces
    )
    return Mesh(np.asarray(vertices, np.float32), np.asarray(faces, np.int64))


def _marching_cubes(density: NDArray[np.float32], threshold: float, low: NDArray[np.float64], voxel: float) -> Mesh:
    # Densities far above the threshold are cut off, so that a very dense sample does not push the surface all the way
    # to its empty neighbour: a hard surface lies half-way between the two, a soft one where it is.
    bounded = np.pad(np.clip(density / threshold, 0, 2), 1)
    vertices, faces, _, _ = marching_cubes(bounded.astype(np.float32), 1.0)
    # One step of padding lies outside the box: what was interpolated towards it is put back onto the box.
    vertices = np.clip(vertices - 1, 0, np.array(density.shape) - 1) * voxel + low
    return _outward(_without_degenerate(Mesh(vertices.astype(np.float32), faces.astype(np.int64))))


def _outward(mesh: Mesh) -> Mesh:
    volume = np.einsum("ij,ij->", mesh.corners.mean(1, dtype=np.float64), mesh.face_normals())
    return mesh if volume >= 0 else Mesh(mesh.vertices, np.ascontiguousarray(mesh.faces[:, ::-1]))


def _without_degenerate(mesh: Mesh) -> Mesh:
    """Merge vertices at the same place and drop faces without three different ones."""
    _, first, inverse = np.unique(mesh.vertices, axis=0, return_index=True, return_inverse=True)
    faces = inverse.reshape(-1)[mesh.faces]
    different = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])
    return _compact(mesh.vertices[first], faces[different])


def _compact(vertices: NDArray[np.float32], faces: NDArray[np.int64]) -> Mesh:
    used, inverse = np.unique(faces, return_inverse=True)
    return Mesh(vertices[used], inverse.reshape(-1, 3).astype(np.int64))
