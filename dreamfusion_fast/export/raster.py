"""Which face covers which pixel: of a texture, and of a picture of the mesh."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from dreamfusion_fast.export.mesh import Mesh
from dreamfusion_fast.rendering.cameras import Cameras

_CHUNK = 1 << 22  # pairs of a face and a pixel of its bounding box that are tested at a time


@dataclass(frozen=True)
class MeshView:
    """A camera's view of a mesh, one entry per pixel, row 0 at the top."""

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


def rasterize_view(
    mesh: Mesh, cameras: Cameras, view: int, height: int, width: int, *, closed: bool = False
) -> MeshView:
    """Find for each pixel the nearest face that covers its centre.

    Args:
        mesh: what is looked at. Faces that reach behind the camera are left out.
        cameras: on the CPU.
        view: which of the cameras.
        height, width: of the picture.
        closed: the mesh is closed, so faces that turn away cannot be seen and are left out. Else they can.
    """
    pose = cameras.camera_to_world[view].double().numpy()
    right, up, back = ((mesh.vertices - pose[:, 3]) @ pose[:, :3]).T
    focal = 0.5 * height / math.tan(0.5 * float(cameras.fov_y[view]))
    aspect = 1.0 if cameras.pixel_aspect is None else float(cameras.pixel_aspect[view])
    right_by, down_by = (0.0, 0.0) if cameras.shift is None else cameras.shift[view].tolist()
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = -1.0 / back  # of the distance along the viewing direction
        column = focal / aspect * right * inverse + (0.5 * width - 0.5 + height * right_by)
        row = (0.5 * height - 0.5 + height * down_by) - focal * up * inverse
    before = np.flatnonzero((back < -1e-6)[mesh.faces].all(1))
    points = np.stack([column, row], -1)[mesh.faces[before]]
    if closed:  # rows run downwards, so what is counter-clockwise seen from outside is clockwise here
        ab, ac = points[:, 1] - points[:, 0], points[:, 2] - points[:, 0]
        towards = ab[:, 0] * ac[:, 1] < ab[:, 1] * ac[:, 0]
        before, points = before[towards], points[towards]
    faces = mesh.faces[before]
    nearest = np.zeros(height * width)
    index = np.full(height * width, -1, np.int64)
    weights = np.zeros((height * width, 3), np.float32)
    for face, pixel, coordinates in _covered_pixels(points, height, width):
        shares = coordinates * inverse[faces[face]]
        here = shares.sum(1)
        np.maximum.at(nearest, pixel, here)
        wins = here == nearest[pixel]
        face, pixel, shares, here = face[wins], pixel[wins], shares[wins], here[wins]
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
    size = np.array([width, height])
    low = np.clip(np.ceil(points.min(1) - 1e-6), 0, size).astype(np.int64)
    high = np.clip(np.floor(points.max(1) + 1e-6) + 1, 0, size).astype(np.int64)
    extent = np.maximum(high - low, 0)
    count = extent[:, 0] * extent[:, 1]
    a, ab, ac = points[:, 0], points[:, 1] - points[:, 0], points[:, 2] - points[:, 0]
    area = ab[:, 0] * ac[:, 1] - ab[:, 1] * ac[:, 0]
    count[np.abs(area) < 1e-12] = 0
    (kept,) = count.nonzero()
    low, extent, count, a, ab, ac, area = (x[kept] for x in (low, extent, count, a, ab, ac, area))
    # The second and third coordinate are linear in column and row: their slopes, and their values at (0, 0).
    slopes = np.stack([ac[:, 1], -ac[:, 0], -ab[:, 1], ab[:, 0]]) / area
    second_at_zero, third_at_zero = (-(a[:, 0] * x + a[:, 1] * y) for x, y in (slopes[:2], slopes[2:]))
    ends = np.cumsum(count)
    start = 0
    while start < len(kept):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _CHUNK, side="right")))
        part = slice(start, stop)
        # One row per pair of a face and a pixel of its bounding box.
        repeat = partial(np.repeat, repeats=count[part])
        within = np.arange(int(count[part].sum())) - repeat(ends[part] - count[part] - done)
        down, across = np.divmod(within, repeat(extent[part, 0]))
        column, row = repeat(low[part, 0]) + across, repeat(low[part, 1]) + down
        second = repeat(second_at_zero[part]) + repeat(slopes[0, part]) * column + repeat(slopes[1, part]) * row
        third = repeat(third_at_zero[part]) + repeat(slopes[2, part]) * column + repeat(slopes[3, part]) * row
        inside = (second >= -1e-6) & (third >= -1e-6) & (second + third <= 1 + 1e-6)
        second, third = second[inside], third[inside]
        pixel = row[inside] * width + column[inside]
        yield repeat(kept[part])[inside], pixel, np.stack([1 - second - third, second, third], -1)
        start = stop
