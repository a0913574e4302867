"""Cameras: conventions, sampling distributions, seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dreamfusion_fast.rendering import CameraConfig, orbit_cameras, sample_cameras, spherical_positions

NO_NUMBERS = (math.nan, math.inf, -math.inf)


def sample(config: CameraConfig, batch: int, seed: int = 0):
    return sample_cameras(config, batch, torch.Generator().manual_seed(seed))


def test_front_camera() -> None:
    camera = orbit_cameras(1, elevation_deg=0, distance=3, fov_deg=90)
    torch.testing.assert_close(camera.positions, torch.tensor([[0.0, 0, 3]]))
    right, up, back = camera.camera_to_world[0, :, :3].T
    torch.testing.assert_close(right, torch.tensor([1.0, 0, 0]))
    torch.testing.assert_close(up, torch.tensor([0.0, 1, 0]))
    torch.testing.assert_close(back, torch.tensor([0.0, 0, 1]))
    rays = camera.rays(2, 4)
    # 90 degrees over two rows: focal length one pixel; pixel centres at x = -1.5 .. 1.5, y = 0.5 then -0.5.
    expected = torch.tensor([[x, y, -1.0] for y in (0.5, -0.5) for x in (-1.5, -0.5, 0.5, 1.5)])
    torch.testing.assert_close(rays.directions, expected / expected.norm(dim=1, keepdim=True))
    assert torch.equal(rays.origins, camera.positions.expand(8, 3))


def test_azimuth_is_positive_towards_x() -> None:
    cameras = orbit_cameras(4, elevation_deg=0, distance=2)
    expected = torch.tensor([[0.0, 0, 2], [2, 0, 0], [0, 0, -2], [-2, 0, 0]])
    torch.testing.assert_close(cameras.positions, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(cameras.camera_to_world[1, :, 0], torch.tensor([0.0, 0, -1]), rtol=0, atol=1e-6)


def test_middle_of_the_image_sees_the_origin() -> None:
    cameras = sample(CameraConfig(), 7)
    rays = cameras.rays(3, 5)
    middle = rays.directions.view(7, 15, 3)[:, 7]
    torch.testing.assert_close(middle, -cameras.positions / cameras.distance[:, None], rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [CameraConfig(), CameraConfig.paper()])
def test_poses_are_rotations(config: CameraConfig) -> None:
    rotation = sample(config, 113).camera_to_world[:, :, :3]
    identity = torch.eye(3).expand(113, 3, 3)
    torch.testing.assert_close(rotation.transpose(1, 2) @ rotation, identity, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(113), rtol=0, atol=1e-5)


@pytest.mark.parametrize("elevation", [90.0, -90.0])
def test_straight_above_and_below(elevation: float) -> None:
    pose = orbit_cameras(4, elevation_deg=elevation).camera_to_world
    assert pose.isfinite().all()
    azimuth = torch.arange(4) * math.pi / 2
    right = torch.stack([azimuth.cos(), torch.zeros(4), -azimuth.sin()], dim=1)
    torch.testing.assert_close(pose[:, :, 0], right, rtol=0, atol=1e-5)


def test_default_ranges() -> None:
    cameras = sample(CameraConfig(), 4000)
    distance = 1.05 / math.sin(math.radians(20))
    assert float(cameras.distance.min()) >= distance * (1 - 1e-6)
    assert float(cameras.distance.max()) <= 1.15 * distance * (1 + 1e-6)
    assert torch.allclose(cameras.fov_y, torch.tensor(math.radians(40)))
    elevation = cameras.elevation.rad2deg()
    assert float(elevation.min()) >= -10.001
    assert float(elevation.max()) <= 85.001
    overhead = float((elevation > 60.001).float().mean())
    assert abs(overhead - 0.125) < 4 * math.sqrt(0.125 * 0.875 / 4000)
    torch.testing.assert_close(
        cameras.positions, spherical_positions(cameras.azimuth, cameras.elevation, cameras.distance)
    )


def test_elevation_is_half_uniform_in_angle_half_in_area() -> None:
    config = CameraConfig(elevation_deg=(-10, 90), overhead_fraction=0)
    elevation = sample(config, 20000).elevation
    low, high, at = math.radians(-10), math.radians(90), math.radians(45)
    by_angle = (at - low) / (high - low)
    by_area = (math.sin(at) - math.sin(low)) / (math.sin(high) - math.sin(low))
    share = float((elevation < at).float().mean())
    expected = 0.5 * (by_angle + by_area)
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 20000)


def test_azimuth_is_spread_over_the_batch() -> None:
    turns = (sample(CameraConfig(), 8).azimuth / (2 * math.pi) + 0.5) * 8
    assert sorted(turns.floor().int().tolist()) == list(range(8))
    free = replace(CameraConfig(), spread_azimuth=False, azimuth_deg=(0.0, 90.0))
    azimuth = sample(free, 1000).azimuth.rad2deg()
    assert float(azimuth.min()) >= 0
    assert 80 < float(azimuth.max()) <= 90


def test_paper_cameras() -> None:
    cameras = sample(CameraConfig.paper(), 4000)
    focal = 0.5 / torch.tan(0.5 * cameras.fov_y)
    assert 0.7 - 1e-4 <= float(focal.min()) < 0.71
    assert 1.34 < float(focal.max()) <= 1.35 + 1e-4
    # Uniform in focal length: its mean is the middle of the range, within four standard errors.
    assert abs(float(focal.mean()) - 1.025) < 4 * 0.65 / math.sqrt(12 * 4000)
    offset = cameras.positions - spherical_positions(cameras.azimuth, cameras.elevation, cameras.distance)
    assert 0.09 < float(offset.abs().max()) <= 0.1001


def test_seeds() -> None:
    config = CameraConfig.paper()
    first, again, other = sample(config, 5, 1), sample(config, 5, 1), sample(config, 5, 2)
    assert torch.equal(first.camera_to_world, again.camera_to_world)
    assert torch.equal(first.fov_y, again.fov_y)
    assert not torch.equal(first.camera_to_world, other.camera_to_world)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"elevation_deg": (30.0, 10.0)}, r"elevation_deg: got \(30.0, 10.0\)"),
        ({"fov_deg": (0.0, 40.0)}, r"fov_deg: got"),
        ({"distance": (0.0, 1.0)}, r"distance: got"),
        ({"overhead_fraction": 1.5}, r"overhead_fraction: got 1.5"),
        ({"fov_sampling": "zoom"}, r"fov_sampling: got 'zoom'"),
        ({"up_jitter": -1.0}, r"up_jitter: got -1.0"),
        ({"look_at_jitter": math.inf}, r"look_at_jitter: got inf"),
        ({"position_jitter": math.nan}, r"position_jitter: got nan"),
        ({"distance": (1.0, math.inf)}, r"distance\[1\]: got inf, want a finite number"),
        ({"distance": (-3.0, 1.0)}, r"distance: got \(-3.0, 1.0\)"),
        ({"azimuth_deg": (-math.inf, 0.0)}, r"azimuth_deg\[0\]: got -inf"),
        ({"fov_deg": (40.0, math.nan)}, r"fov_deg\[1\]: got nan"),
        ({"fov_deg": (40.0, 180.0)}, r"fov_deg: got \(40.0, 180.0\)"),
    ],
)
def test_bad_settings_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CameraConfig(**change)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("distance", 0.0, "1e-06 to 1000000000.0"),
        ("distance", -3.0, "1e-06 to 1000000000.0"),
        ("fov_deg", 0.0, "0.1 to 179"),
        ("fov_deg", 180.0, "0.1 to 179"),
        ("elevation_deg", 91.0, "-90 to 90"),
        *((name, value, "") for name in ("distance", "fov_deg", "elevation_deg", "start_deg") for value in NO_NUMBERS),
    ],
)
def test_bad_orbits_are_named(name: str, value: float, wanted: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: got {value}, want {wanted}"):
        orbit_cameras(3, **{name: value})


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("camera_to_world", lambda pose: pose[:, :2], ValueError, r"got shape \[3, 2, 4\], want \[B, 3, 4\]"),
        ("camera_to_world", lambda pose: pose.long(), TypeError, "got torch.int64, want float32 or float64"),
        ("camera_to_world", lambda pose: pose / 0.0, ValueError, "got a value that is not finite"),
        ("azimuth", lambda x: x[:2], ValueError, r"got shape \[2\], want \[3\]"),
        ("elevation", lambda x: x.double(), ValueError, "got torch.float64 on cpu, want torch.float32 on cpu"),
        ("elevation", lambda x: x + math.nan, ValueError, "got a value that is not finite"),
        ("distance", lambda x: x.to("meta"), ValueError, "got torch.float32 on meta, want torch.float32 on cpu"),
        ("distance", lambda x: x * 0.0, ValueError, "got 0.0, want above 0.0 and below inf"),
        ("distance", lambda x: x + math.nan, ValueError, "got nan, want above 0.0"),
        ("fov_y", lambda x: x * 0.0 + 4.0, ValueError, "got 4.0, want above 0.0 and below 3.14159"),
        ("fov_y", lambda x: -x, ValueError, "got -0.69"),
    ],
)
def test_bad_cameras_are_named(name: str, change: Callable, error: type[Exception], message: str) -> None:
    cameras = orbit_cameras(3)
    with pytest.raises(error, match=rf"cameras\.{name}: {message}"):
        replace(cameras, **{name: change(getattr(cameras, name))})


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="batch: got 0"):
        sample(CameraConfig(), 0)
    with pytest.raises(ValueError, match="count: got 0"):
        orbit_cameras(0)
    with pytest.raises(ValueError, match="height, width: got 0, 4"):
        orbit_cameras(1).rays(0, 4)
    with pytest.raises(ValueError, match="height, width: got 4, -1"):
        orbit_cameras(1).rays(4, -1)
