"""Which face covers which pixel: of a texture, and of a picture of the mesh."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dreamfusion_fast.export.mesh import Mesh
from dreamfusion_fast.rendering.cameras import Cameras

_CHUNK = 1 << 22  # pairs of a face and a pixel of its bounding box that are tested at a time


@dataclass(frozen=True)
class MeshView:
    """What a camera sees of a mesh, one entry per pixel, row 0 at the top."""

    face: NDArray[np.int64]
    """[height, width], index of the nearest face, -1 where there is none."""
    weights: NDArray[np.float32]
    """[height, width, 3], barycentric coordinates on the face, corrected for perspective."""

    @property
    def covered(self) -> NDArray[np.bool_]:
        """[height, width], where there is a face."""
        return self.face >= 0

    def interpolated(self, faces: NDArray[np.int64], values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Values of the vertices [n_vertices, c] at the covered pixels, [n_covered, c], row by row."""
        corners = faces[self.face[self.covered]]
        return np.einsum("nkc,nk->nc", values[corners], self.weights[self.covered])


def rasterize_texture(
    uv: NDArray[np.float32], faces: NDArray[np.int64], height: int, width: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Find for each texel the face that covers its centre, and where in the face.

    Row 0 is the top of the texture (v = 1); the centre of texel (row, column) is at u = (column + 0.5) / width,
    v = 1 - (row + 0.5) / height. A texel on a shared edge belongs to the face of the higher index.

    Args:
        uv: [n_vertices, 2].
        faces: [n_faces, 3].
        height, width: of the texture.

    Returns:
        Face index [height, width], -1 where there is none, and barycentric coordinates [height, width, 3].
    """
    points = np.stack([uv[:, 0] * width - 0.5, (1 - uv[:, 1]) * height - 0.5], -1).astype(np.float64)[faces]
    index = np.full(height * width, -1, np.int64)
    weights = np.zeros((height * width, 3), np.float32)
    for face, pixel, coordinates in _covered_pixels(points, height, width):
        # Where texels are written twice, both arrays keep the last write of the same order.
        index[pixel] = face
        weights[pixel] = coordinates
    return index.reshape(height, width), weights.reshape(height, width, 3)


def rasterize_view(mesh: Mesh, cameras: Cameras, view: int, height: int, width: int) -> MeshView:
    """Find for each pixel the nearest face that covers its centre; faces are seen from both sides.

    Args:
        mesh: what is looked at. Faces that reach behind the camera are left out.
        cameras: on the CPU.
        view: which of the cameras.
        height, width: of the picture.
    """
    pose = cameras.camera_to_world[view].double().numpy()
    right, up, back = ((mesh.vertices - pose[:, 3]) @ pose[:, :3]).T
    focal = 0.5 * height / math.tan(0.5 * float(cameras.fov_y[view]))
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = -1.0 / back  # of the distance along the viewing direction
        column = focal * right * inverse + (0.5 * width - 0.5)
        row = (0.5 * height - 0.5) - focal * up * inverse
    before = np.flatnonzero((back < -1e-6)[mesh.faces].all(1))
    faces = mesh.faces[before]
    nearest = np.zeros(height * width)
    index = np.full(height * width, -1, np.int64)
    weights = np.zeros((height * width, 3), np.float32)
    for face, pixel, coordinates in _covered_pixels(np.stack([column, row], -1)[faces], height, width):
        shares = coordinates * inverse[faces[face]]
        here = shares.sum(1)
        order = np.argsort(here, kind="stable")  # the last write wins, so the nearest goes last
        face, pixel, shares, here = face[order], pixel[order], shares[order], here[order]
        nearer = here > nearest[pixel]
        face, pixel, shares, here = face[nearer], pixel[nearer], shares[nearer], here[nearer]
        nearest[pixel] = here
        index[pixel] = before[face]
        weights[pixel] = shares / here[:, None]
    return MeshView(index.reshape(height, width), weights.reshape(height, width, 3))


def _covered_pixels(
    points: NDArray[np.float64], height: int, width: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]]:
    """Pairs of a triangle and a pixel whose centre it covers, in the order of the triangles.

    Args:
        points: [n_faces, 3, 2], (column, row) of the corners; pixel centres are at whole numbers.

    Yields:
        Triangle [n], pixel [n] = row * width + column, and barycentric coordinates [n, 3].
    """
    if not len(points):
        return
    size = np.array([width, height])
    low = np.clip(np.ceil(points.min(1) - 1e-6), 0, size).astype(np.int64)
    high = np.clip(np.floor(points.max(1) + 1e-6) + 1, 0, size).astype(np.int64)
    extent = np.maximum(high - low, 0)
    count = extent[:, 0] * extent[:, 1]
    a, ab, ac = points[:, 0], points[:, 1] - points[:, 0], points[:, 2] - points[:, 0]
    area = ab[:, 0] * ac[:, 1] - ab[:, 1] * ac[:, 0]
    count[np.abs(area) < 1e-12] = 0
    ends = np.cumsum(count)
    start = 0
    while start < len(points):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _CHUNK, side="right")))
        # One row per pair of a face and a pixel of its bounding box.
        face = np.repeat(np.arange(start, stop), count[start:stop])
        within = np.arange(len(face)) - np.repeat(ends[start:stop] - count[start:stop] - done, count[start:stop])
        column = low[face, 0] + within % extent[face, 0]
        row = low[face, 1] + within // extent[face, 0]
        x, y = column - a[face, 0], row - a[face, 1]
        second = (x * ac[face, 1] - y * ac[face, 0]) / area[face]
        third = (y * ab[face, 0] - x * ab[face, 1]) / area[face]
        first = 1 - second - third
        inside = (first >= -1e-6) & (second >= -1e-6) & (third >= -1e-6)
        yield face[inside], (row * width + column)[inside], np.stack([first, second, third], -1)[inside]
        start = stop
