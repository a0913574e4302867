"""Pictures for judges: what is seen of an object from around it, and the one light that all are shown in.

Meshes and models of the catalogue give the same three layers (albedo, normals, coverage), so both are lit alike.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dreamfusion_fast.export import UnwrappedMesh
from dreamfusion_fast.export.picture import mesh_colors
from dreamfusion_fast.export.raster import rasterize_view
from dreamfusion_fast.rendering import orbit_cameras

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

VIEWS, SIZE = 8, 224
ELEVATION_DEG = 15.0
FACE_VIEWS, FACE_SIZE = 24, 64
"""For the classifier of views (`faces.py`)."""
MODES = ("colour", "textureless")
_AMBIENT, _DIFFUSE = 0.55, 0.5
_LAMP_ABOVE = 0.7  # the lamp is at the camera, raised by this part of its distance
_CLAY = 0.75
_SAMPLES = 2  # along each side of a pixel


@dataclass(frozen=True)
class Layers:
    """Views of one object, the first from the front, then to its left (the camera moves towards +X).

    Attributes:
        albedo: [n, size, size, 3] in [0, 1], straight; anything where nothing is.
        normal: [n, size, size, 3], of the scene, unit length; zero where nothing is.
        alpha: [n, size, size], coverage in [0, 1].
    """

    albedo: NDArray[np.float32]
    normal: NDArray[np.float32]
    alpha: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.alpha)

    def every(self, step: int) -> Layers:
        """Each `step`-th view."""
        return Layers(self.albedo[::step], self.normal[::step], self.alpha[::step])


def eye_directions(count: int, elevation_deg: float = ELEVATION_DEG) -> NDArray[np.float64]:
    """Unit vectors [count, 3] from the object to the cameras; +Z is the front, +Y is up."""
    azimuth, elevation = np.arange(count) * (2 * np.pi / count), np.deg2rad(elevation_deg)
    flat = np.cos(elevation)
    return np.stack([flat * np.sin(azimuth), np.full(count, np.sin(elevation)), flat * np.cos(azimuth)], -1)


def turned_to_camera(layers: Layers) -> NDArray[np.float32]:
    """Normals [n, size, size, 3] in the axes of each view's camera: right, up, back."""
    back = eye_directions(len(layers))
    right = np.cross([0.0, 1.0, 0.0], back)
    right /= np.linalg.norm(right, axis=-1, keepdims=True)
    axes = np.stack([right, np.cross(back, right), back], 1)
    return np.einsum("nhwc,nkc->nhwk", layers.normal, axes).astype(np.float32)


def lit(layers: Layers, mode: str) -> NDArray[np.float32]:
    """Pictures [n, size, size, 3] in [0, 1] on white: in `colour`, or `textureless`, the shape alone in light grey."""
    lamp = eye_directions(len(layers)) + np.array([0.0, _LAMP_ABOVE, 0.0])
    lamp /= np.linalg.norm(lamp, axis=-1, keepdims=True)
    light = _AMBIENT + _DIFFUSE * np.clip(np.einsum("nhwc,nc->nhw", layers.normal, lamp), 0, 1)
    albedo = layers.albedo if mode == "colour" else np.full_like(layers.albedo, _CLAY)
    alpha = layers.alpha[..., None]
    return (np.clip(albedo * light[..., None], 0, 1) * alpha + 1 - alpha).astype(np.float32)


def of_mesh(unwrapped: UnwrappedMesh, texture: NDArray[np.uint8], views: int = VIEWS, size: int = SIZE) -> Layers:
    """Views of a closed mesh; texture is [height, width, 3]."""
    cameras, fine = orbit_cameras(views, ELEVATION_DEG), size * _SAMPLES
    albedo = np.zeros((views, size, size, 3), np.float32)
    normal, alpha = np.zeros_like(albedo), np.zeros((views, size, size), np.float32)
    for view in range(views):
        seen = rasterize_view(unwrapped.mesh, cameras, view, fine, fine, closed=True)
        layer = np.zeros((fine, fine, 7), np.float32)
        layer[seen.covered, :3] = mesh_colors(unwrapped, texture, seen)
        layer[seen.covered, 3:6] = seen.interpolated(unwrapped.mesh.faces, unwrapped.normals)
        layer[seen.covered, 6] = 1
        mean = layer.reshape(size, _SAMPLES, size, _SAMPLES, 7).mean((1, 3))
        alpha[view] = mean[..., 6]
        albedo[view] = mean[..., :3] / np.maximum(alpha[view], 1e-6)[..., None]
        length = np.linalg.norm(mean[..., 3:6], axis=-1, keepdims=True)
        normal[view] = np.where(length > 1e-6, mean[..., 3:6] / np.maximum(length, 1e-6), 0)
    return Layers(albedo, normal, alpha)


def of_file(path: Path, views: int = VIEWS, size: int = SIZE) -> Layers:
    """Views of a run's mesh.glb."""
    from mesh_sheet import load

    return of_mesh(*load(path), views, size)


def of_blob(size: int = SIZE, noise: bool = False) -> NDArray[np.float32]:
    """A control, pictures [VIEWS, size, size, 3]: a grey disc on white, or one of noise."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    disc = (x**2 + y**2 < 0.6**2)[None, ..., None]
    inside = np.random.default_rng(0).uniform(size=(VIEWS, size, size, 3)) if noise else 0.5
    return np.where(disc, inside, np.ones((VIEWS, size, size, 3))).astype(np.float32)


def controls(size: int = SIZE) -> dict[str, NDArray[np.float32]]:
    """Pictures [VIEWS, size, size, 3] that show nothing, by name."""
    shape = (VIEWS, size, size, 3)
    noise = np.random.default_rng(1).uniform(size=shape).astype(np.float32)
    return {
        "blank white": np.ones(shape, np.float32),
        "blank grey": np.full(shape, 0.5, np.float32),
        "grey disc": of_blob(size),
        "noise": noise,
        "noise disc": of_blob(size, noise=True),
    }
