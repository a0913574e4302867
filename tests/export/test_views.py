"""Cameras around a ball."""

from __future__ import annotations

import numpy as np
import torch

from dreamfusion_fast.export.views import one, rings


def test_every_camera_shows_the_whole_ball_and_little_more():
    center, radius = torch.tensor([0.3, -0.2, 0.5]), 0.7
    cameras = rings(((-80.0, 3), (10.0, 4), (85.0, 2)), center, radius)
    assert len(cameras) == 9
    for view in range(9):
        rays = one(cameras, view).rays(64, 64)
        to_center = center - rays.origins
        missed = torch.linalg.cross(to_center, rays.directions).norm(dim=1).view(64, 64)
        assert missed.argmin() in (31 * 64 + 31, 31 * 64 + 32, 32 * 64 + 31, 32 * 64 + 32)
        edge = torch.cat([missed[0], missed[-1], missed[:, 0], missed[:, -1]])
        assert radius < edge.min() < 1.1 * radius


def test_every_second_ring_is_turned_by_half_a_gap():
    cameras = rings(((0.0, 4), (30.0, 4), (60.0, 2)), torch.zeros(3), 1.0)
    np.testing.assert_allclose(cameras.azimuth.rad2deg(), [0, 90, 180, 270, 45, 135, 225, 315, 0, 180], atol=1e-3)
    np.testing.assert_allclose(cameras.elevation.rad2deg(), [0] * 4 + [30] * 4 + [60] * 2, atol=1e-3)


def test_one_is_a_batch_of_one():
    cameras = rings(((0.0, 3), (30.0, 2)), torch.ones(3), 1.0)
    alone = one(cameras, 3)
    assert len(alone) == 1
    for name in ("camera_to_world", "fov_y", "azimuth", "elevation", "distance"):
        torch.testing.assert_close(getattr(alone, name)[0], getattr(cameras, name)[3])
