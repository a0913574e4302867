"""The random draws of each step: shading, cameras, lights and backgrounds, and with the cameras the rays of the step.

On a GPU all of it happens on a stream of its own, beside the step before: rays are made, and the samples along them
counted, while the last step's diffusion model still runs. So the host knows in time how much there is to render, never
waits for a step to end, and the GPU always finds the next launch waiting.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamfusion_fast.fields.background import per_view, random_colors
from dreamfusion_fast.guidance.contract import Views
from dreamfusion_fast.rendering.cameras import Cameras
from dreamfusion_fast.rendering.orbits import sample_cameras
from dreamfusion_fast.rendering.shading import Shading, sample_lights
from dreamfusion_fast.rendering.volume.prepared import PreparedRays
from dreamfusion_fast.rendering.volume.renderer import VolumeRenderer
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.device import send

# Steps that the host may be ahead of the GPU: what they have drawn is in memory.
_AHEAD = 2


# Distance of cameras that see nothing, scene units: far beyond the scene box.
_AWAY = 1000.0


@dataclass(frozen=True)
class DrawnViews:
    """Views and how they are shown, on the device.

    Attributes:
        size: height and width, pixels.
        shading: of all views.
        views: what the guidance is told.
        prepared: the rays, `B * size * size`, views one after another.
        light: positions `[B * size * size, 3]` for shadings that read them, else None.
        plain: background colours `[B * size * size, 3]`, or None for the learned background.
    """

    size: int
    shading: Shading
    views: Views
    prepared: PreparedRays
    light: Tensor | None
    plain: Tensor | None


class ViewSampler:
    """Draws the views of training steps.

    Args:
        config: the run's settings.
        device: where views are to be.
        generator: on the CPU, source of all random numbers here.
        own: the views that are rendered; others are drawn as well, and their rays meet nothing.
        group: so many views show the object together, evenly from around it, before one plain background.
    """

    def __init__(
        self, config: Config, device: torch.device, generator: torch.Generator, own: slice, group: int = 1
    ) -> None:
        self._config, self._device, self._generator, self._own, self._group = config, device, generator, own, group
        self._batch = config.batch_on(device)
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._steps: deque[torch.cuda.Event] = deque()
        self._grid_revision: Hashable = None

    def draw(self, size: int, progress: float, renderer: VolumeRenderer) -> DrawnViews:
        """All of a step's random numbers but the guidance's. They are drawn on the CPU and sent at once.

        Args:
            size: height and width of the views, pixels.
            progress: of the run, 0 to 1.
            renderer: what will render them.
        """
        config, batch = self._config, self._batch
        shading = self._draw_shading(progress)
        cameras = sample_cameras(config.camera, batch, self._generator, group=self._group)
        plain = self._draw_backgrounds()
        lights = sample_lights(cameras.positions, self._generator, distance=config.shading.light_distance)
        seed = int(torch.randint(2**31 - 1, (), generator=self._generator))

        last_row = torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(batch, 1, 4)
        pose = cameras.camera_to_world
        if (self._own.start, self._own.stop) != (0, batch):
            pose = _turned_away(pose, self._own)
        poses = torch.cat([pose, last_row], dim=1)
        values = [poses, cameras.fov_y, cameras.azimuth, cameras.elevation, lights]
        with self._beside_the_last_step(renderer):
            pose, fov_y, azimuth, elevation, lights, *rest = send(
                self._device, *values, *([] if plain is None else [plain])
            )
            prepared = renderer.prepare(Cameras(pose[:, :3], fov_y), size, True, seed)
            background = rest[0] if rest else None
            drawn = DrawnViews(
                size,
                shading,
                Views(azimuth, elevation, background, shading.value, pose, fov_y, self._group),
                prepared,
                per_view(lights, size * size) if shading.needs_normals else None,
                per_view(rest[0], size * size) if rest else None,
            )
        if self._stream is not None:
            stream = torch.cuda.current_stream(self._device)
            for tensor in (azimuth, prepared.rays.origins, prepared.rays.directions, drawn.light, drawn.plain):
                if tensor is not None:  # all that was sent is one block, so azimuth stands for it
                    tensor.record_stream(stream)
        return drawn

    def _draw_shading(self, progress: float) -> Shading:
        c = self._config.shading
        draw = float(torch.rand((), generator=self._generator))
        if progress < c.albedo_steps or draw < c.albedo_probability:
            return Shading.ALBEDO
        return Shading.TEXTURELESS if draw < c.albedo_probability + c.textureless_probability else Shading.LAMBERTIAN

    def _draw_backgrounds(self) -> Tensor | None:
        """Plain colours `[B, 3]` on the CPU, one for each group, or None for the learned background."""
        c, groups = self._config.background, self._batch // self._group
        draws = torch.rand(groups + 1, generator=self._generator)
        colors = random_colors(groups, self._generator)
        if float(draws[0]) >= c.plain:
            return None
        colors = torch.where((draws[1:] < c.white)[:, None], torch.ones_like(colors), colors)
        return colors.repeat_interleave(self._group, dim=0)

    @contextmanager
    def _beside_the_last_step(self, renderer: VolumeRenderer) -> Iterator[None]:
        """On a GPU, work goes to the sampler's stream within, and the current one waits for it afterwards."""
        if self._stream is None:
            yield
            return
        current = torch.cuda.current_stream(self._device)
        self._steps.append(current.record_event())
        if len(self._steps) > _AHEAD:
            self._steps.popleft().synchronize()
        # The only thing that is read here and written by steps.
        revision = None if renderer.occupancy is None else renderer.occupancy.revision
        if revision != self._grid_revision:
            self._grid_revision = revision
            self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)


def _turned_away(poses: Tensor, own: slice) -> Tensor:
    """The poses `[B, 3 or 4, 4]`, all but the own ones behind the scene and looking away from it.

    So rays keep their numbers, which the jitter of their samples depends on, and a share is rendered as it is in the
    whole batch.
    """
    away = torch.eye(4, dtype=poses.dtype)[: poses.shape[1]]
    away[2, 3] = -_AWAY
    turned = away.expand_as(poses).clone()
    turned[own] = poses[own]
    return turned
