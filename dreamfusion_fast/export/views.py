"""Cameras all around an object, for measuring and for looking at it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dreamfusion_fast.rendering.cameras import Cameras
from dreamfusion_fast.rendering.orbits import OrbitCameras, orbit_cameras

FOV_DEG = 40.0


def rings(
    counts: Sequence[tuple[float, int]], center: Tensor, radius: float, device: torch.device | str = "cpu"
) -> OrbitCameras:
    """Cameras in rings around a ball that they show whole, with 5 % to spare.

    Args:
        counts: (elevation in degrees, number of cameras) of each ring; every second ring is turned by half a gap.
        center: [3], of the ball, scene units.
        radius: of the ball, scene units.
        device: where the cameras are to be.
    """
    distance = 1.05 * radius / math.sin(math.radians(0.5 * FOV_DEG))
    parts = [
        orbit_cameras(count, elevation, distance, FOV_DEG, start_deg=180.0 / count * (ring % 2))
        for ring, (elevation, count) in enumerate(counts)
    ]
    names = ("camera_to_world", "fov_y", "azimuth", "elevation", "distance")
    joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    cameras = OrbitCameras(**joined)
    poses = cameras.camera_to_world.clone()
    poses[:, :, 3] += center.cpu()
    return replace(cameras, camera_to_world=poses).to(device)


def one(cameras: Cameras, view: int) -> Cameras:
    """One of the cameras, as a batch of one."""
    return cameras[view : view + 1]
