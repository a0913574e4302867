"""Models that read several views of an object together."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from analytic import GaussianModel, embeddings
from fakes import BallGuidance, small_config
from torch import Tensor

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance import GuidanceConfig, GuidanceRequest, ScoreDistillation, Views
from dreamfusion_fast.rendering import CameraConfig, sample_cameras
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.sections import BackgroundConfig
from dreamfusion_fast.training.trainer import Trainer


class FourViews(GaussianModel):
    """Wants to see each pixel as the mean of a group's views shows it, and notes what it was told."""

    views_per_group = 4

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[Tensor, Views]] = []

    def predict(self, noisy: Tensor, t: Tensor, condition: Any, views: Views) -> Tensor:
        self.told.append((t, views))
        together = noisy.unflatten(0, (-1, 4))
        mean = together.mean(dim=1, keepdim=True).expand_as(together).flatten(0, 1)
        return super().predict(noisy, t, condition, views) + (noisy - mean).repeat(
            len(condition["value"]) // len(noisy), 1, 1, 1
        )


def views(count: int = 8, group: int = 4) -> Views:
    poses = torch.eye(4).expand(count, 4, 4) * torch.arange(1.0, count + 1)[:, None, None]
    azimuth = torch.arange(count) * 0.7
    return Views(azimuth, torch.zeros(count), camera_to_world=poses, fov_y=azimuth + 1, group=group)


def gradient(views_per_call: int | None = None, group: int = 4) -> Any:
    model = FourViews()
    images = torch.rand(8, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    request = GuidanceRequest(
        images, embeddings(), views(group=group), generator=generator, views_per_call=views_per_call
    )
    return model, ScoreDistillation(model, GuidanceConfig(cache=False)).gradient(request)


def test_a_group_shares_its_timestep_and_not_its_noise() -> None:
    model, out = gradient()
    assert len(set(out.t[:4].tolist())) == len(set(out.t[4:].tolist())) == 1
    assert out.t[0] != out.t[4]
    noisy, _, _ = model.asked[0]
    assert len({float(view[0, 0, 0]) for view in noisy}) == 8


@pytest.mark.parametrize(("views_per_call", "sizes"), [(1, [4, 4]), (5, [4, 4]), (7, [4, 4]), (8, [8])])
def test_calls_are_of_whole_groups(views_per_call: int, sizes: list[int]) -> None:
    model, out = gradient(views_per_call)
    assert [len(told) for _, told in model.told] == sizes
    assert all(told.group == 4 for _, told in model.told)
    _, whole = gradient()
    torch.testing.assert_close(out.gradient, whole.gradient, rtol=1e-12, atol=1e-12)


def test_cameras_arrive() -> None:
    model, _ = gradient(4)
    second = model.told[1][1]
    expected = views()
    assert expected.camera_to_world is not None
    assert expected.fov_y is not None
    assert torch.equal(second.camera_to_world, expected.camera_to_world[4:])
    assert torch.equal(second.fov_y, expected.fov_y[4:])


def test_other_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"views\.group: got 1, want 4, as many views as gaussian reads together"):
        gradient(group=1)
    with pytest.raises(ValueError, match="group: got 3, want a divisor of the number of views, 8"):
        views(group=3)
    with pytest.raises(ValueError, match=r"camera_to_world must have shape \[2, 4, 4\], got \(2, 3, 4\)"):
        Views(torch.zeros(2), torch.zeros(2), camera_to_world=torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"fov_y must have shape \[2\], got \(3,\)"):
        Views(torch.zeros(2), torch.zeros(2), fov_y=torch.zeros(3))


def test_cameras_of_a_group_are_evenly_around_the_object() -> None:
    config = CameraConfig(fov_deg=(15.0, 60.0), overhead_fraction=0.0)
    cameras = sample_cameras(config, 8, torch.Generator().manual_seed(3), group=4)
    for first in (0, 4):
        rows = slice(first, first + 4)
        steps = cameras.azimuth[rows].diff()
        torch.testing.assert_close(steps, torch.full((3,), math.pi / 2))
        for values in (cameras.elevation, cameras.distance, cameras.fov_y):
            assert len(set(values[rows].tolist())) == 1
    assert cameras.elevation[0] != cameras.elevation[4]
    with pytest.raises(ValueError, match="group: got 3, want a divisor of the batch, 8"):
        sample_cameras(config, 8, torch.Generator(), group=3)


class GroupedBall(BallGuidance):
    views_per_group = 2


def test_a_run_draws_groups_with_their_cameras() -> None:
    guidance = GroupedBall()
    trainer = Trainer(small_config(batch=4, steps=1), torch.device("cpu"), guidance)
    trainer.step()
    told = guidance.calls[0]["views"]
    assert told.group == 2
    torch.testing.assert_close(told.azimuth[1::2] - told.azimuth[::2], torch.full((2,), math.pi))
    pose = told.camera_to_world
    assert torch.equal(pose[:, 3], torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(4, 4))
    position = pose[:, :3, 3]
    torch.testing.assert_close(torch.atan2(position[:, 0], position[:, 2]).cos(), told.azimuth.cos())
    assert float(told.fov_y[0]) == pytest.approx(math.radians(40))


def test_a_batch_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(UserError, match="batch: got 3, want a multiple of 2: ball reads so many views together"):
        Trainer(dataclasses.replace(small_config(), batch=3), torch.device("cpu"), GroupedBall())


class Thirds(BallGuidance):
    views_per_group = 3


def test_a_default_batch_is_whole_groups() -> None:
    assert [Config().batch_on(torch.device(name), 3) for name in ("cpu", "cuda")] == [3, 9]
    assert Config(batch=2).batch_on(torch.device("cpu"), 3) == 2  # which the trainer refuses
    trainer = Trainer(dataclasses.replace(small_config(), batch=None), torch.device("cpu"), Thirds())
    assert trainer.batch == trainer.config.batch == 3  # as checkpoints hold it


def test_views_of_a_group_have_one_plain_background() -> None:
    config = small_config(batch=6, steps=1, background=BackgroundConfig(plain=1.0, white=0.0))
    guidance = Thirds()
    Trainer(config, torch.device("cpu"), guidance).step()
    background = guidance.calls[0]["views"].background.view(2, 3, 3)
    assert torch.equal(background, background[:, :1].expand(2, 3, 3))
    assert not torch.equal(background[0], background[1])


def test_memory_is_saved_by_whole_groups() -> None:
    trainer = Trainer(small_config(batch=15), torch.device("cpu"), Thirds())
    sizes = [plan.views_per_call for plan in trainer.planner.ladder]
    assert list(dict.fromkeys(sizes)) == [15, 9, 6, 3]
