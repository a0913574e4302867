"""Rays and cameras, occupancy grid, shading and the volume renderer."""

from dreamfusion_fast.rendering.cameras import Cameras
from dreamfusion_fast.rendering.config import RendererConfig
from dreamfusion_fast.rendering.occupancy import OccupancyGrid
from dreamfusion_fast.rendering.orbits import (
    CameraConfig,
    OrbitCameras,
    orbit_cameras,
    sample_cameras,
    spherical_positions,
)
from dreamfusion_fast.rendering.ray_budget import RayBudget
from dreamfusion_fast.rendering.rays import InvalidRaysError, Rays
from dreamfusion_fast.rendering.shading import Shading, sample_lights, shade
from dreamfusion_fast.rendering.volume.prepared import PreparedRays, RaySamples, RenderOutput
from dreamfusion_fast.rendering.volume.renderer import VolumeRenderer
from dreamfusion_fast.rendering.volume.sampling import cone_distances

__all__ = [
    "CameraConfig",
    "Cameras",
    "InvalidRaysError",
    "OccupancyGrid",
    "OrbitCameras",
    "PreparedRays",
    "RayBudget",
    "RaySamples",
    "Rays",
    "RenderOutput",
    "RendererConfig",
    "Shading",
    "VolumeRenderer",
    "cone_distances",
    "orbit_cameras",
    "sample_cameras",
    "sample_lights",
    "shade",
    "spherical_positions",
]
