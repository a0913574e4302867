"""Triangle meshes, and what makes them fit to be used: pieces, smoothing, decimation."""

from __future__ import annotations

from dataclasses import dataclass

import fast_simplification
import numpy as np
import scipy.sparse
from numpy.typing import NDArray


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


def components(mesh: Mesh) -> NDArray[np.int64]:
    """[n_faces]: the connected piece that each face belongs to, counted from 0."""
    n = len(mesh.vertices)
    edges = (np.ones(2 * len(mesh.faces)), (mesh.faces[:, [0, 1]].ravel("F"), mesh.faces[:, [1, 2]].ravel("F")))
    _, label = scipy.sparse.csgraph.connected_components(scipy.sparse.coo_matrix(edges, (n, n)), directed=False)
    _, pieces = np.unique(label[mesh.faces[:, 0]], return_inverse=True)
    return pieces.astype(np.int64)


def keep_faces(mesh: Mesh, keep: NDArray[np.bool_]) -> Mesh:
    """The faces [n_faces] where `keep` is set, and the vertices that they have."""
    used, inverse = np.unique(mesh.faces[keep], return_inverse=True)
    return Mesh(mesh.vertices[used], inverse.reshape(-1, 3).astype(np.int64))


def keep_large_components(mesh: Mesh, min_component: float) -> Mesh:
    """Drop connected pieces with less than `min_component` of the largest one's area, and the walls of cavities."""
    piece = components(mesh)
    normals = mesh.face_normals()
    area = np.bincount(piece, np.linalg.norm(normals, axis=1) / 2)
    # Signed volume, from the divergence theorem; a cavity's surface points into the cavity, so its volume is negative.
    volume = np.bincount(piece, np.einsum("ij,ij->i", mesh.corners.mean(1), normals) / 6)
    solid = volume > 0
    if not solid.any():
        solid[:] = True
    keep = solid & (area >= min_component * area[solid].max())
    return keep_faces(mesh, keep[piece])


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


def outward(mesh: Mesh) -> Mesh:
    """The mesh with its faces turned so that its volume is not negative."""
    volume = np.einsum("ij,ij->", mesh.corners.mean(1, dtype=np.float64), mesh.face_normals())
    return mesh if volume >= 0 else Mesh(mesh.vertices, np.ascontiguousarray(mesh.faces[:, ::-1]))


def without_degenerate(mesh: Mesh) -> Mesh:
    """Merge vertices at the same place; drop faces without three different ones, and fins, two faces of one place."""
    _, first, inverse = np.unique(mesh.vertices, axis=0, return_index=True, return_inverse=True)
    faces = inverse.reshape(-1)[mesh.faces]
    different = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])
    faces = faces[different]
    _, face, count = np.unique(np.sort(faces, axis=1), axis=0, return_inverse=True, return_counts=True)
    return keep_faces(Mesh(mesh.vertices[first], faces), count[face.reshape(-1)] != 2)
