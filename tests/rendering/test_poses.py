"""Cameras from poses and intrinsics of other projects: conventions, gradients, sizes, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dreamfusion_fast.rendering import CameraConfig, Cameras, orbit_cameras, sample_cameras

WIDTH, HEIGHT = 7, 5
FX, FY, CX, CY = 6.0, 4.5, 2.25, 3.1
PIXELS = (FX, FY, CX, CY)


def matrix(values: tuple[float, ...] = PIXELS, dtype: torch.dtype = torch.float64) -> Tensor:
    fx, fy, cx, cy = values
    return torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=dtype)


def poses(count: int = 3, rows: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random rotations and positions."""
    generator = torch.Generator().manual_seed(8)
    rotation, _ = torch.linalg.qr(torch.randn(count, 3, 3, dtype=torch.float64, generator=generator))
    rotation = rotation * torch.linalg.det(rotation)[:, None, None]
    position = 3 * torch.randn(count, 3, 1, dtype=torch.float64, generator=generator)
    last = torch.tensor([[[0.0, 0.0, 0.0, 1.0]]], dtype=torch.float64).expand(count, 1, 4)
    return torch.cat([torch.cat([rotation, position], dim=2), last], dim=1)[:, :rows].to(dtype)


def expected_rays(pose: Tensor, intrinsics: Tensor, convention: str) -> tuple[np.ndarray, np.ndarray]:
    """By inverse matrices in float64, pixel by pixel."""
    origins, directions = [], []
    for one, k in zip(pose.double().numpy(), intrinsics.double().numpy(), strict=True):
        for row in range(HEIGHT):
            for column in range(WIDTH):
                local = np.linalg.inv(k) @ np.array([column + 0.5, row + 0.5, 1.0])
                if convention == "opengl":
                    local = local * [1.0, -1.0, -1.0]
                direction = one[:3, :3] @ local
                origins.append(one[:3, 3])
                directions.append(direction / np.linalg.norm(direction))
    return np.array(origins), np.array(directions)


@pytest.mark.parametrize("convention", ["opencv", "opengl"])
@pytest.mark.parametrize("rows", [3, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-7), (torch.float64, 1e-15)])
def test_rays_are_those_of_the_matrices(convention: Any, rows: int, dtype: torch.dtype, tolerance: float) -> None:
    pose = poses(rows=rows, dtype=dtype)
    each = torch.stack([matrix((FX + i, FY - 0.3 * i, CX - i, CY + i)) for i in range(3)])
    rays = Cameras.from_poses(pose, each, WIDTH, HEIGHT, convention).rays()
    origins, directions = expected_rays(pose, each, convention)
    assert rays.origins.dtype == dtype
    rays.validate()
    np.testing.assert_array_equal(rays.origins.numpy(), origins.astype(rays.origins.numpy().dtype))
    np.testing.assert_allclose(rays.directions.numpy(), directions, rtol=0, atol=tolerance)
    assert rays.reshape(3, HEIGHT, WIDTH).shape == (3, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    "intrinsics",
    [
        matrix(),
        matrix().expand(3, 3, 3),
        PIXELS,
        list(PIXELS),
        (torch.tensor(FX), torch.full((3,), FY), CX, torch.tensor(CY, dtype=torch.float64)),
        torch.from_numpy(matrix().numpy()),
    ],
)
def test_forms_of_intrinsics(intrinsics: Any) -> None:
    found = Cameras.from_poses(poses(), intrinsics, WIDTH, HEIGHT).rays()
    wanted = expected_rays(poses(), matrix().expand(3, 3, 3), "opencv")[1]
    np.testing.assert_allclose(found.directions.numpy(), wanted, rtol=0, atol=1e-7)


def test_an_orbit_given_as_a_pose_is_the_same_camera() -> None:
    orbit = orbit_cameras(3, fov_deg=50.0)
    focal = 0.5 * 8 / math.tan(math.radians(25.0))
    given = Cameras.from_poses(orbit.camera_to_world, (focal, focal, 4.5, 4.0), 9, 8, "opengl")
    torch.testing.assert_close(given.rays().directions, orbit.rays(8, 9).directions, rtol=0, atol=5e-7)
    assert torch.equal(given.rays().origins, orbit.rays(8, 9).origins)


@pytest.mark.parametrize("batch", [1, 7])
def test_rays_of_cameras_without_a_pixel_aspect_or_shift_are_what_they_were(batch: int) -> None:
    """To the last bit, so that runs repeat: the formula before there were lenses of other kinds."""
    cameras = sample_cameras(CameraConfig.paper(), batch, torch.Generator().manual_seed(batch))
    for height, width in ((64, 64), (5, 9), (1, 2)):
        x = torch.arange(width, dtype=torch.float32) + (0.5 - 0.5 * width)
        y = (0.5 * height - 0.5) - torch.arange(height, dtype=torch.float32)
        focal = (0.5 * height) / torch.tan(0.5 * cameras.fov_y)
        right, up, back = cameras.camera_to_world[:, None, None, :, :3].unbind(dim=-1)
        rows = y[:, None, None] * up - focal[:, None, None, None] * back
        wanted = torch.nn.functional.normalize((x[:, None] * right + rows).reshape(-1, 3), dim=1)
        assert torch.equal(cameras.rays(height, width).directions, wanted)
        lens = Cameras(cameras.camera_to_world, cameras.fov_y, torch.ones(batch), torch.zeros(batch, 2))
        assert torch.equal(lens.rays(height, width).directions, wanted)


def test_a_smaller_image_shows_the_same() -> None:
    """The mean of a block of four rays of the large image goes where the small image's ray goes, almost."""
    cameras = Cameras.from_poses(poses(1), (200.0, 180.0, 61.0, 52.0), 120, 100)
    small = cameras.rays(50, 60).directions.view(50, 60, 3)
    large = cameras.rays().directions.view(50, 2, 60, 2, 3).mean(dim=(1, 3))
    torch.testing.assert_close(small, large, rtol=0, atol=1e-4)
    half = Cameras.from_poses(poses(1), (100.0, 90.0, 30.5, 26.0), 60, 50)
    torch.testing.assert_close(small.view(-1, 3), half.rays().directions, rtol=0, atol=1e-14)


def test_gradients_to_poses_and_intrinsics() -> None:
    base = poses(2, rows=3)

    def directions(turn: Tensor, position: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Poses refined by a small rotation, as by a matrix exponential."""
        x, y, z = turn.unbind(dim=1)
        zero = torch.zeros_like(x)
        skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=1).view(-1, 3, 3)
        rotation = torch.matrix_exp(skew) @ base[:, :, :3]
        pose = torch.cat([rotation, position[:, :, None]], dim=2)
        rays = Cameras.from_poses(pose, tuple(k.unbind(dim=1)), 3, 2).rays()
        return rays.origins, rays.directions

    turn = 0.1 * torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    k = torch.tensor([[3.0, 4.0, 1.2, 1.1], [2.0, 2.5, 1.6, 0.7]], dtype=torch.float64)
    inputs = [value.clone().requires_grad_() for value in (turn, base[:, :, 3], k)]
    assert torch.autograd.gradcheck(directions, inputs)


def test_choosing_and_moving() -> None:
    cameras = Cameras.from_poses(poses(5), PIXELS, WIDTH, HEIGHT)
    rays = cameras.rays().reshape(5, HEIGHT * WIDTH)
    for index in (slice(1, 3), torch.tensor([4, 0]), torch.arange(5) > 2):
        chosen = cameras[index]
        assert chosen.image_size == (HEIGHT, WIDTH)
        assert torch.equal(chosen.rays().directions, rays[index].flat().directions)
    moved = cameras.to("meta", torch.float32)
    for name in ("camera_to_world", "fov_y", "pixel_aspect", "shift"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).dtype == torch.float32
    orbit = orbit_cameras(4)
    assert torch.equal(orbit[1:3].azimuth, orbit.azimuth[1:3])


def change(view: int, row: int, column: int, value: float) -> Callable[[Tensor], Tensor]:
    def changed(pose: Tensor) -> Tensor:
        pose = pose.clone()
        pose[view, row, column] = value
        return pose

    return changed


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (lambda p: p.half(), TypeError, r"got torch.float16, want a tensor \[B, 3, 4\] or \[B, 4, 4\] of float32"),
        (lambda p: p.tolist(), TypeError, "got list, want a tensor"),
        (lambda p: p[0], ValueError, r"got shape \[4, 4\], want \[B, 3, 4\] or \[B, 4, 4\]"),
        (lambda p: p[:, :, :3], ValueError, r"got shape \[3, 4, 3\]"),
        (lambda p: p.transpose(1, 2), ValueError, "got .* as last row of pose 0, want 0, 0, 0, 1"),
        (change(1, 3, 3, 2.0), ValueError, r"got \[0.0, 0.0, 0.0, 2.0\] as last row of pose 1"),
        (change(2, 1, 0, math.nan), ValueError, "got a pose 2 that is no rotation and position: .* off by nan"),
        (lambda p: torch.cat([1.01 * p[:, :3, :3], p[:, :3, 3:]], 2), ValueError, "got a pose 0 .* off by 0.0201"),
        (lambda p: p[:, :3] + p[:, :3, [1, 0, 2, 3]] * 0.1, ValueError, "got a pose 0 that is no rotation"),
        (lambda p: p * torch.tensor([-1.0, 1.0, 1.0, 1.0]), ValueError, "got a pose 0 that mirrors, want a rotation"),
        (change(1, 0, 3, math.inf), ValueError, "got a value that is not finite"),
    ],
)
def test_bad_poses_are_named(bad: Callable[[Tensor], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^(cameras\.)?camera_to_world: {message}"):
        Cameras.from_poses(bad(poses()), PIXELS, WIDTH, HEIGHT)


def test_rounded_poses_are_taken() -> None:
    Cameras.from_poses((poses() * 1e4).round() / 1e4, PIXELS, WIDTH, HEIGHT)


SKEWED = matrix()
SKEWED[0, 1] = 0.1


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (matrix().expand(2, 3, 3), ValueError, r"got shape \[2, 3, 3\], want \[3, 3\] or \[3, 3, 3\]"),
        (torch.ones(4), ValueError, r"got shape \[4\]"),
        (matrix().long(), TypeError, "got torch.int64, want a floating-point tensor"),
        (SKEWED, ValueError, "got a skew or another last row"),
        (2.0 * matrix(), ValueError, "got a skew or another last row"),
        (matrix().numpy(), TypeError, "got ndarray, want a tensor, or four numbers or tensors"),
        (None, TypeError, "got NoneType, want a tensor"),
        (matrix().tolist(), TypeError, "got list, want a tensor"),
        ((1.0, 2.0, 3.0), ValueError, "got 3 values, want four"),
        ((1.0, -2.0, 3.0, 4.0), ValueError, "got fy = -2.0, want a finite number above 0"),
        ((torch.tensor([1.0, 0.0, 1.0]), 2.0, 3.0, 4.0), ValueError, "got fx = 0.0"),
        ((1.0, 2.0, math.nan, 4.0), ValueError, "got cx = nan, want a finite number"),
        ((1.0, 2.0, 3.0, torch.ones(2)), ValueError, r"got cy of shape \[2\], want \[\] or \[3\]"),
        (matrix().to("meta"), ValueError, "got fx on meta, want cpu, where the poses are"),
    ],
)
def test_bad_intrinsics_are_named(bad: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^intrinsics: {message}"):
        Cameras.from_poses(poses(), bad, WIDTH, HEIGHT)


def test_other_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"^convention: got 'blender', want opencv or opengl"):
        Cameras.from_poses(poses(), PIXELS, WIDTH, HEIGHT, "blender")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^width, height: got 0, 5, want both at least 1"):
        Cameras.from_poses(poses(), PIXELS, 0, HEIGHT)
    with pytest.raises(ValueError, match=r"^height, width: got None, want both for cameras without an image_size"):
        orbit_cameras(1).rays()
    with pytest.raises(ValueError, match=r"^height, width: got 4, None, want both at least 1"):
        orbit_cameras(1).rays(4)
    lens = {"camera_to_world": poses(3, 3), "fov_y": torch.ones(3, dtype=torch.float64)}
    for wrong, message in (
        ({"shift": torch.zeros(3).double()}, r"shift: got shape \[3\], want \[3, 2\]"),
        ({"pixel_aspect": torch.zeros(3).double()}, "pixel_aspect: got 0.0, want above 0.0"),
        ({"pixel_aspect": torch.ones(3)}, "pixel_aspect: got torch.float32 on cpu, want torch.float64"),
        ({"image_size": (0, 4)}, r"image_size: got \(0, 4\), want a height and a width of at least 1"),
    ):
        with pytest.raises(ValueError, match=rf"^cameras\.{message}"):
            Cameras(**lens, **wrong)
