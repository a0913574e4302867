"""The scene that every benchmark measures, so that figures can be laid side by side.

One camera at distance 2 (azimuth and elevation 0.3 rad, 60 degrees field of view) looks at the origin through the box
[-1, 1]^3. The occupancy grid, 128^3, holds a ball of radius r: r = 0.5 is an object in its box, r = 1 fills it. Step
2 sqrt(3) / 512, jitter, no early stop. Hash grid 16 x 2, 2^19 rows, 16 to 2048; MLP 32-64-64-4; softplus density with
Magic3D's blob; the gradient of a random image. A triplane in the hash grid's place has 128 x 128 vertices of 16
features, and the MLP 48-64-64-4.

A pruned scene is rendered as people render a trained one: the field is fitted to a solid ball first, and samples that
1e-4 of the light reaches, or with an opacity of 0.01, are all that is rendered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dreamfusion_fast import ops
from dreamfusion_fast.rendering import Rays, orbit_cameras

RESOLUTION = 128
STEP = 2 * math.sqrt(3) / 512
AABB = (-1.0, -1.0, -1.0, 1.0, 1.0, 1.0)
LIGHT = (1.0, 2.0, 3.0)
SHADINGS = ("albedo", "lambertian", "textureless")
EARLY_STOP, ALPHA_THRESHOLD = 1e-4, 1e-2  # of pruned scenes
_SOLID = 0.45  # radius of the ball that fields of pruned scenes are fitted to
_FITS = 200
_POINTS = {"cpu": 1 << 10, "cuda": 1 << 16}


@dataclass(frozen=True)
class Scene:
    """A scene: the object, the camera and the light.

    Attributes:
        rays: `n_rays = size^2` rays.
        occupied: bool `[128, 128, 128]`, the ball.
        shading: one of `SHADINGS`; all but albedo compute normals.
        light: point light `[3]`.
        image_gradient: `[n_rays, 3]`, what backward starts from.
        pruned: whether the field is fitted, and samples are dropped that hardly count.
    """

    rays: Rays
    occupied: Tensor
    shading: str
    light: Tensor
    image_gradient: Tensor
    pruned: bool = False

    @property
    def device(self) -> torch.device:
        return self.occupied.device


def make_scene(size: int, radius: float, shading: str, device: torch.device, pruned: bool = False) -> Scene:
    """The scene at `size^2` rays, with a ball of `radius`."""
    gradient = torch.randn(size * size, 3, generator=torch.Generator().manual_seed(1))
    return Scene(
        rays=camera_rays(size, device),
        occupied=ball(radius, device),
        shading=shading,
        light=torch.tensor(LIGHT, device=device),
        image_gradient=gradient.to(device),
        pruned=pruned,
    )


def fit(density: Callable[[Tensor], Tensor], parameters: Sequence[nn.Parameter], device: torch.device) -> None:
    """Fit a field to a solid ball: opaque within a step inside, empty outside.

    Args:
        density: of positions `[m, 3]`, `[m]`.
        parameters: what is optimised.
        device: where the field is.
    """
    draws = torch.Generator(device).manual_seed(2)
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(_FITS):
        positions = 2.0 * torch.rand(_POINTS[device.type], 3, generator=draws, device=device) - 1.0
        inside = (positions.norm(dim=1) < _SOLID).float()
        opacity = -torch.expm1(-density(positions).float() * STEP)
        optimizer.zero_grad()
        (opacity - inside).square().sum().backward()  # a mean's gradients would be too small for 16 bits
        optimizer.step()
    optimizer.zero_grad()


def camera_rays(size: int, device: torch.device) -> Rays:
    """`size^2` rays of the one camera."""
    angle = math.degrees(0.3)
    camera = orbit_cameras(1, elevation_deg=angle, distance=2.0, fov_deg=60.0, start_deg=angle)
    return camera.rays(size, size).to(device)


def ball(radius: float, device: torch.device) -> Tensor:
    """Which of the 128^3 cells have their centre in the ball, bool."""
    axis = (torch.arange(RESOLUTION, device=device) + 0.5) * (2 / RESOLUTION) - 1
    return axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2 < radius**2


@dataclass(frozen=True)
class Marched:
    """Input and output of the march of one image: the input of the ops that follow it.

    Attributes:
        arguments: of `ops.march`.
        offsets: int32 `[n_rays + 1]`.
        t: `[n_samples]`.
        unit: `[n_samples, 3]`, positions in [0, 1]^3, as the hash grid takes them.
    """

    arguments: tuple[object, ...]
    offsets: Tensor
    t: Tensor
    unit: Tensor


def march_scene(size: int, radius: float, device: torch.device) -> Marched:
    """March the scene's rays, with jitter of seed 1."""
    rays = camera_rays(size, device)
    aabb = torch.tensor(AABB, device=device)
    bitfield = ops.occupancy_pack(ball(radius, device).float(), 0.5)
    near_far = ops.ray_box(rays.origins, rays.directions, aabb)
    arguments = (rays.origins, rays.directions, *near_far, aabb, bitfield, RESOLUTION, STEP, True, 1)
    offsets, t, ray = ops.march(*arguments)
    positions = rays.origins[ray] + t[:, None] * rays.directions[ray]
    return Marched(arguments, offsets, t, (positions + 1) / 2)
