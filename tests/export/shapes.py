"""Fields for the tests of the export: balls, rods, plates and wires, hard and soft, and what is measured of meshes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor

from dreamfusion_fast.export import (
    Agreement,
    Mesh,
    UnwrappedMesh,
    agreement,
    extract_mesh,
    measure_agreement,
    sample_density,
    seen,
)
from dreamfusion_fast.rendering.config import RendererConfig
from dreamfusion_fast.rendering.volume.renderer import VolumeRenderer

BOX = torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0, 1.0])
HARD = 400.0  # density of what nobody looks through
THICKNESS = 0.04  # of thin parts: 2 % of the box
SOFT_DEPTH = 2.5  # optical depth of soft parts, straight through the middle

Density = Callable[[Tensor], Tensor]


@contextmanager
def smaller_pictures() -> Iterator[None]:
    """Makes the pictures smaller that a mesh is made from, and those fewer that it is compared with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seen, "_SIZE", 128)
        patch.setattr(agreement, "VIEWS", ((-10.0, 2), (30.0, 2), (80.0, 1)))
        yield


def ball(center, radius: float, peak: float = 100.0, sharpness: float = 80.0) -> Density:
    center = torch.tensor(center)
    return lambda positions: peak * torch.sigmoid(sharpness * (radius - length(positions - center)))


def lumpy(positions: Tensor) -> Tensor:
    """Density without symmetry: a ball with an arm along +x and a nose along +z."""
    body = positions.norm(dim=-1) - 0.5
    nose = (positions - torch.tensor([0.0, 0.1, 0.55])).norm(dim=-1) - 0.2
    arm = (positions - torch.tensor([0.6, 0.2, 0.0])).norm(dim=-1) - 0.2
    return 100 * torch.sigmoid(-80 * torch.minimum(torch.minimum(body, nose), arm))


def length(vectors: Tensor) -> Tensor:
    """The same as norm(dim=1), in half of the time."""
    x, y, z = vectors.unbind(dim=1)
    return (x * x + y * y + z * z).sqrt()


def to_segment(positions: Tensor, start, end) -> Tensor:
    """Distance to a line from `start` to `end`."""
    start, along = torch.tensor(start), torch.tensor(end) - torch.tensor(start)
    share = ((positions - start) @ along / along.square().sum()).clamp(0, 1)
    return length(positions - start - share[:, None] * along)


def to_ring(positions: Tensor, height: float, radius: float) -> Tensor:
    """Distance to a level circle around the y axis."""
    x, y, z = positions.unbind(dim=1)
    return torch.hypot(torch.hypot(x, z) - radius, y - height)


def to_square(positions: Tensor, center, half: float, slant_deg: float = 0.0) -> Tensor:
    """Distance to a level square, or to one that was turned about the x axis and as far about the y axis."""
    x, y, z = (positions - torch.tensor(center)).unbind(dim=1)
    angle = torch.deg2rad(torch.tensor(slant_deg))
    x, z = x * angle.cos() + z * angle.sin(), z * angle.cos() - x * angle.sin()
    y, z = y * angle.cos() + z * angle.sin(), z * angle.cos() - y * angle.sin()
    return length(torch.stack([(x.abs() - half).clamp(min=0), y, (z.abs() - half).clamp(min=0)], dim=1))


def hard(distance: Tensor) -> Tensor:
    """Density of what ends half the thickness away."""
    return HARD * (distance < 0.5 * THICKNESS).float()


def soft(distance: Tensor) -> Tensor:
    """Density that falls off like a Gaussian."""
    width = 0.5 * THICKNESS
    return SOFT_DEPTH / (width * np.sqrt(2 * np.pi)) * torch.exp(-0.5 * (distance / width).square())


def grey(density: Density):
    """A field of that density, all of one colour."""
    return lambda positions: (density(positions), torch.full_like(positions, 0.5))


def extract(density: Density, box: Tensor = BOX, resolution: int = 128, **settings) -> Mesh:
    """The surface of a density, sampled on a grid of that resolution."""
    return extract_mesh(sample_density(density, box, resolution), **settings)


def as_trimesh(mesh: Mesh) -> trimesh.Trimesh:
    return trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)


def sphere(center, radius: float, inside_out: bool = False) -> Mesh:
    solid = trimesh.creation.icosphere(subdivisions=3, radius=radius)
    faces = np.asarray(solid.faces, np.int64)
    return Mesh((solid.vertices + center).astype(np.float32), faces[:, ::-1].copy() if inside_out else faces)


def together(*meshes: Mesh) -> Mesh:
    starts = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes[:-1])])
    faces = [mesh.faces + start for mesh, start in zip(meshes, starts, strict=True)]
    return Mesh(np.concatenate([mesh.vertices for mesh in meshes]), np.concatenate(faces))


def contains(mesh: Mesh, points) -> np.ndarray:
    """Which points are inside, by the solid angle that the mesh fills around them (Van Oosterom and Strackee 1983)."""
    turns = []
    for point in np.asarray(points, np.float64):
        a, b, c = np.moveaxis(mesh.corners - point, 1, 0)
        la, lb, lc = (np.linalg.norm(corner, axis=1) for corner in (a, b, c))
        numerator = np.einsum("ij,ij->i", a, np.cross(b, c))
        denominator = la * lb * lc + (a * b).sum(1) * lc + (b * c).sum(1) * la + (c * a).sum(1) * lb
        turns.append(np.arctan2(numerator, denominator).sum() / (2 * np.pi))
    return np.array(turns) > 0.5


def one_colour(mesh: Mesh) -> UnwrappedMesh:
    """A mesh for a texture that is the same everywhere."""
    return UnwrappedMesh(mesh, mesh.vertex_normals(), np.full((len(mesh.vertices), 2), 0.5, np.float32))


def renderer_of(field, resolution: int) -> VolumeRenderer:
    """Of a field in the box, sampled wherever there is something on a grid of that resolution."""
    grid = sample_density(lambda positions: field(positions)[0], BOX, resolution)
    return VolumeRenderer(field, grid.occupancy, RendererConfig(step=grid.voxel))


def agreement_with(density: Density, mesh: Mesh, resolution: int = 128) -> Agreement:
    """How far a mesh shows what the render of a grey field of that density shows."""
    grey_texture = np.full((1, 1, 3), 128, np.uint8)
    return measure_agreement(renderer_of(grey(density), resolution), one_colour(mesh), grey_texture)
