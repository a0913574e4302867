"""Renders of several objects at once, in the ball that they fill."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamfusion_fast.fields.triplane_field import SCENE, TriplaneField
from dreamfusion_fast.rendering.config import RendererConfig
from dreamfusion_fast.rendering.occupancy import OccupancyGrid
from dreamfusion_fast.rendering.rays import Rays
from dreamfusion_fast.rendering.volume.prepared import RenderOutput
from dreamfusion_fast.rendering.volume.renderer import VolumeRenderer

_CELLS = 32  # of the grid's sides


class ObjectRenderer:
    """Samples the ball inscribed in the box: the field has no density outside, and half of the box is.

    Args:
        field: whose MLP decodes all planes.
        samples_across: as of `RendererConfig`.
        device: where it renders.
    """

    def __init__(self, field: TriplaneField, samples_across: int, device: torch.device) -> None:
        self.field = field
        self.config = RendererConfig(samples_across=samples_across)
        middles = (torch.arange(_CELLS, device=device) + 0.5) * (2 / _CELLS) - 1
        nearest = (middles.abs() - 1 / _CELLS).clamp(min=0).square()  # of each cell's points
        distance = nearest[:, None, None] + nearest[None, :, None] + nearest[None, None, :]
        self._ball = OccupancyGrid(step_size=self.config.step_of(field.aabb.tolist()), resolution=_CELLS).to(device)
        self._ball.set_occupied(distance < 1)

    def render(
        self,
        planes: Tensor,
        rays: Rays,
        scene: Tensor,
        background: Tensor,
        seed: int | None = None,
        with_distortion: bool = False,
    ) -> RenderOutput:
        """Rays `[m]` into scenes `[m]` of planes `[n, 3, side, side, features]`.

        Args:
            planes, rays, scene, background: background `[m, 3]` or `[3]`.
            seed: of the samples' jitter; None: no jitter.
            with_distortion: compute the distortion loss.
        """
        renderer = VolumeRenderer(self.field.with_planes(planes), self._ball, self.config)
        return renderer.render(
            rays,
            background,
            jitter=seed is not None,
            seed=seed or 0,
            with_distortion=with_distortion,
            extras={SCENE: scene} if len(planes) > 1 else None,
        )
