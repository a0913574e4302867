"""Rays and cameras, occupancy grid, shading and the volume renderer."""

from dreamfusion_fast.rendering.cameras import CameraConfig, Cameras, orbit_cameras, sample_cameras, spherical_positions
from dreamfusion_fast.rendering.config import RendererConfig
from dreamfusion_fast.rendering.occupancy import OccupancyGrid
from dreamfusion_fast.rendering.rays import InvalidRaysError, Rays
from dreamfusion_fast.rendering.renderer import RenderOutput, VolumeRenderer
from dreamfusion_fast.rendering.sample_total import SampleCount
from dreamfusion_fast.rendering.sampling import cone_distances
from dreamfusion_fast.rendering.shading import Shading, sample_lights, shade

__all__ = [
    "CameraConfig",
    "Cameras",
    "InvalidRaysError",
    "OccupancyGrid",
    "Rays",
    "RenderOutput",
    "RendererConfig",
    "SampleCount",
    "Shading",
    "VolumeRenderer",
    "cone_distances",
    "orbit_cameras",
    "sample_cameras",
    "sample_lights",
    "shade",
    "spherical_positions",
]
