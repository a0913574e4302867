"""A scene of any field: parameter groups, state, pictures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dreamfusion_fast.fields import Field, FieldOutput, MlpBackground
from dreamfusion_fast.rendering import OccupancyGrid, RendererConfig, orbit_cameras
from dreamfusion_fast.scene import Scene


class SoftBall(Field):
    """One density in a ball, one colour; neither kernels nor groups of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(3.0))

    def forward(self, positions: Tensor, with_normal: bool = False) -> FieldOutput:
        density = torch.exp(self.logit - 20.0 * positions.square().sum(dim=1))
        normal = nn.functional.normalize(positions, dim=1) if with_normal else None
        return FieldOutput(density, torch.full_like(positions, 0.25), normal)


def make_scene() -> Scene:
    field = SoftBall()
    occupancy = OccupancyGrid(field.aabb, resolution=8)
    occupancy.update(field, 0)
    return Scene(field, occupancy, MlpBackground(), RendererConfig(samples_across=64))


def test_parameters_by_learning_rate() -> None:
    scene = make_scene()
    groups = scene.parameter_groups()
    assert groups["mlp"] == [scene.field.logit]
    assert groups["background"] == list(scene.background.parameters())
    assert groups.keys() == {"mlp", "background"}


def test_state_survives() -> None:
    scene, other = make_scene(), make_scene()
    with torch.no_grad():
        scene.field.logit.fill_(1.0)
    state = scene.state()
    other.restore(lambda part: {k[len(part) + 1 :]: v for k, v in state.items() if k.startswith(f"{part}.")})
    cameras = orbit_cameras(1)
    assert torch.equal(scene.render(cameras, 9), other.render(cameras, 9))


def test_pictures() -> None:
    pictures = make_scene().render(orbit_cameras(3), 11, "lambertian")
    assert pictures.shape == (3, 11, 11, 3)
    torch.testing.assert_close(pictures[:, 0, 0], torch.ones(3, 3))
    assert float(pictures[:, 5, 5].max()) < 0.7
    # Lit from above, where rows begin.
    assert float(pictures[:, 3, 5].mean()) > float(pictures[:, 7, 5].mean())
