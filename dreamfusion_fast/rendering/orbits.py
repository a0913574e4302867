"""Cameras around an object: drawn for training, and evenly spaced for turntables.

A camera at azimuth 0 and elevation 0 sits on +Z and sees the front of the object; azimuth grows towards +X.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from dreamfusion_fast.rendering.cameras import Cameras
from dreamfusion_fast.settings import Range, Settings

# At this distance a ball of radius 1 just fits, with 5 % to spare, into a field of view of 40 degrees.
_FITTING_DISTANCE = 1.05 / math.sin(math.radians(20.0))
# What cameras may be, by the name of the argument.
_ELEVATION_DEG = Range(-90, 90)
_AZIMUTH_DEG = Range(-1e6, 1e6)
_DISTANCE = Range(1e-6, 1e9)
_FOV_DEG = Range(0.1, 179)
_JITTER = Range(0, 1e6)


@dataclass(frozen=True, kw_only=True)
class OrbitCameras(Cameras):
    """Cameras that know where around the origin they were put, before any jitter of the position.

    Attributes:
        azimuth: `[B]`, radians.
        elevation: `[B]`, radians.
        distance: `[B]` from the origin, scene units, above 0.
    """

    azimuth: Tensor
    elevation: Tensor
    distance: Tensor

    def _check_values(self) -> None:
        super()._check_values()
        self._check_finite("azimuth", "elevation")
        self._check_between("distance", 0.0, math.inf)


@dataclass(frozen=True)
class CameraConfig(Settings):
    """How training cameras are drawn.

    The defaults frame the unit ball as the embedded prior's training views do: 40 degrees, distances 3.07 to 3.53,
    elevations -10 to 60 degrees and an eighth of the views overhead. :meth:`paper` gives DreamFusion's.
    """

    elevation_deg: Annotated[tuple[float, float], _ELEVATION_DEG] = (-10.0, 60.0)
    """Elevation range; half of the views are uniform in angle, half uniform in area (DreamFusion, appendix A.2)."""
    overhead_fraction: Annotated[float, Range(0, 1)] = 0.125
    """Share of the views drawn from overhead_elevation_deg instead."""
    overhead_elevation_deg: Annotated[tuple[float, float], _ELEVATION_DEG] = (60.0, 85.0)
    """Elevation range of the overhead views."""
    azimuth_deg: Annotated[tuple[float, float], _AZIMUTH_DEG] = (-180.0, 180.0)
    """Azimuth range; 0 is the front."""
    spread_azimuth: bool = True
    """Give each view of a batch its own equal part of the azimuth range, in random order."""
    distance: Annotated[tuple[float, float], _DISTANCE] = (_FITTING_DISTANCE, 1.15 * _FITTING_DISTANCE)
    """Range of the distance from the origin, scene units."""
    fov_deg: Annotated[tuple[float, float], _FOV_DEG] = (40.0, 40.0)
    """Range of the vertical field of view."""
    fov_sampling: Literal["angle", "focal"] = "angle"
    """Whether the angle or the focal length is uniform over the range."""
    position_jitter: Annotated[float, _JITTER] = 0.0
    """Half-width of a uniform offset of the position, per axis."""
    look_at_jitter: Annotated[float, _JITTER] = 0.0
    """Standard deviation of the point looked at, per axis."""
    up_jitter: Annotated[float, _JITTER] = 0.0
    """Standard deviation of the up vector, per axis."""

    def check_together(self) -> None:
        for name in ("elevation_deg", "overhead_elevation_deg", "azimuth_deg", "distance", "fov_deg"):
            low, high = getattr(self, name)
            if low > high:
                self.refuse(name, want="the lower end first")

    @classmethod
    def paper(cls) -> CameraConfig:
        """DreamFusion's cameras (Poole et al. 2022, appendix A.2), in its units.

        Distance U(1, 1.5) with U(-0.1, 0.1) jitter, focal length U(0.7, 1.35) image widths, elevation -10 to 90
        degrees.
        """
        widest, narrowest = (math.degrees(2.0 * math.atan(0.5 / focal)) for focal in (0.7, 1.35))
        return cls(
            elevation_deg=(-10.0, 90.0),
            overhead_fraction=0.0,
            distance=(1.0, 1.5),
            fov_deg=(narrowest, widest),
            fov_sampling="focal",
            position_jitter=0.1,
            look_at_jitter=0.2,
            up_jitter=0.02,
            spread_azimuth=False,
        )


def sample_cameras(
    config: CameraConfig,
    batch: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    group: int = 1,
) -> OrbitCameras:
    """Draw `batch` training cameras.

    Args:
        config: ranges and jitters.
        batch: how many views.
        generator: source of randomness; a CPU generator gives the same cameras for every `device`.
        device: where the result lives.
        group: so many cameras, one after another, are evenly around the object, at one elevation, distance and field of
            view, as MVDream's (Shi et al. 2023, arXiv 2308.16512). The azimuth range is that of the first of them.

    Raises:
        ValueError: a batch below 1, or one that is no multiple of the group.
    """
    if batch < 1:
        raise ValueError(f"batch: got {batch}, want at least 1")
    if group < 1 or batch % group:
        raise ValueError(f"group: got {group}, want a divisor of the batch, {batch}")
    groups = batch // group

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(groups, generator=generator, device=generator.device)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(batch, 3, generator=generator, device=generator.device)

    low, high = (math.radians(angle) for angle in config.elevation_deg)
    by_angle = uniform(low, high)
    by_area = torch.asin(uniform(math.sin(low), math.sin(high)).clamp(-1.0, 1.0))
    elevation = torch.where(uniform(0.0, 1.0) < 0.5, by_angle, by_area)
    low, high = (math.radians(angle) for angle in config.overhead_elevation_deg)
    overhead = uniform(low, high)
    elevation = torch.where(uniform(0.0, 1.0) < config.overhead_fraction, overhead, elevation)

    part = uniform(0.0, 1.0)
    if config.spread_azimuth:
        order = torch.randperm(groups, generator=generator, device=generator.device)
        part = (order + part) / groups
    low, high = (math.radians(angle) for angle in config.azimuth_deg)
    azimuth = low + (high - low) * part

    distance = uniform(*config.distance)
    low, high = (math.radians(angle) for angle in config.fov_deg)
    if config.fov_sampling == "focal":
        fov_y = 2.0 * torch.atan(1.0 / uniform(1.0 / math.tan(0.5 * high), 1.0 / math.tan(0.5 * low)))
    else:
        fov_y = uniform(low, high)

    if group > 1:
        around = torch.arange(group, device=azimuth.device) * (2.0 * math.pi / group)
        azimuth = (azimuth[:, None] + around).flatten()
        elevation, distance, fov_y = (value.repeat_interleave(group) for value in (elevation, distance, fov_y))

    offset = config.position_jitter * (2.0 * torch.rand(batch, 3, generator=generator, device=generator.device) - 1.0)
    position = spherical_positions(azimuth, elevation, distance) + offset
    pose = _look_at(position, normal(config.look_at_jitter), normal(config.up_jitter), azimuth)
    return OrbitCameras(pose, fov_y, azimuth=azimuth, elevation=elevation, distance=distance).to(device)


def orbit_cameras(
    count: int,
    elevation_deg: float = 15.0,
    distance: float = 1.1 * _FITTING_DISTANCE,
    fov_deg: float = 40.0,
    start_deg: float = 0.0,
    device: torch.device | str = "cpu",
) -> OrbitCameras:
    """`count` cameras evenly around the object at one elevation, the first at azimuth `start_deg` (0 = front).

    Args:
        count: how many, at least 1.
        elevation_deg: -90 (from below) to 90.
        distance: from the origin, scene units, 1e-6 to 1e9.
        fov_deg: vertical field of view, 0.1 to 179.
        start_deg: azimuth of the first one.
        device: where the result lives.

    Raises:
        ValueError: an argument out of range.
    """
    if count < 1:
        raise ValueError(f"count: got {count}, want at least 1")
    for name, value, limits in (
        ("elevation_deg", elevation_deg, _ELEVATION_DEG),
        ("distance", distance, _DISTANCE),
        ("fov_deg", fov_deg, _FOV_DEG),
        ("start_deg", start_deg, _AZIMUTH_DEG),
    ):
        if value not in limits:
            raise ValueError(f"{name}: got {value}, want {limits}")
    azimuth = math.radians(start_deg) + torch.arange(count, dtype=torch.get_default_dtype()) * (2.0 * math.pi / count)
    elevation = torch.full((count,), math.radians(elevation_deg))
    return cameras_at(azimuth, elevation, torch.full((count,), float(distance)), fov_deg).to(device)


def cameras_at(azimuth: Tensor, elevation: Tensor, distance: Tensor, fov_deg: float = 40.0) -> OrbitCameras:
    """Upright cameras at these places, which look at the origin.

    Args:
        azimuth: `[B]`, radians, 0 = front.
        elevation: `[B]`, radians.
        distance: `[B]` from the origin, scene units, above 0.
        fov_deg: vertical field of view, degrees.
    """
    position = spherical_positions(azimuth, elevation, distance)
    zero = torch.zeros_like(position)
    pose = _look_at(position, zero, zero, azimuth)
    fov_y = torch.full_like(azimuth, math.radians(fov_deg))
    return OrbitCameras(pose, fov_y, azimuth=azimuth, elevation=elevation, distance=distance)


def spherical_positions(azimuth: Tensor, elevation: Tensor, distance: Tensor) -> Tensor:
    """Positions `[B, 3]` = distance * (cos el sin az, sin el, cos el cos az); radians, scene units."""
    flat = elevation.cos()
    unit = torch.stack([flat * azimuth.sin(), elevation.sin(), flat * azimuth.cos()], dim=1)
    return distance[:, None] * unit


def _look_at(position: Tensor, target: Tensor, up_offset: Tensor, azimuth: Tensor) -> Tensor:
    """Poses `[B, 3, 4]` at `position` looking at `target`, up = +Y + `up_offset`."""
    back = torch.nn.functional.normalize(position - target, dim=1)
    up = torch.tensor([0.0, 1.0, 0.0], dtype=position.dtype, device=position.device) + up_offset
    right = torch.linalg.cross(up, back, dim=1)
    length = right.norm(dim=1, keepdim=True)
    # Straight above or below, up and viewing direction agree: the azimuth still says which way is right.
    level = torch.stack([azimuth.cos(), torch.zeros_like(azimuth), -azimuth.sin()], dim=1)
    level = level - (level * back).sum(dim=1, keepdim=True) * back
    right = torch.nn.functional.normalize(torch.where(length > 1e-4, right / length.clamp(min=1e-12), level), dim=1)
    return torch.stack([right, torch.linalg.cross(back, right, dim=1), back, position], dim=2)
