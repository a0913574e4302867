"""A scene: what is optimised and looked at, without a trainer or a diffusion model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from dreamfusion_fast.errors import NonFiniteError
from dreamfusion_fast.fields.background import MlpBackground, per_view
from dreamfusion_fast.fields.base import Field
from dreamfusion_fast.rendering.cameras import Cameras
from dreamfusion_fast.rendering.config import RendererConfig
from dreamfusion_fast.rendering.occupancy import OccupancyGrid
from dreamfusion_fast.rendering.shading import Shading
from dreamfusion_fast.rendering.volume.renderer import VolumeRenderer


class Scene:
    """A field, where it is, what is behind it, and the renderer that shows all three.

    Args:
        field: density and albedo.
        occupancy: the grid that the renderer samples by; of the field's box.
        background: the learned background.
        config: of the renderer.
    """

    def __init__(
        self, field: Field, occupancy: OccupancyGrid, background: MlpBackground, config: RendererConfig
    ) -> None:
        self.field, self.occupancy, self.background = field, occupancy, background
        self.renderer = VolumeRenderer(field, occupancy, config)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.field.aabb.device

    def render_by(self, config: RendererConfig) -> None:
        """Render with other settings from now on."""
        if config != self.renderer.config:  # a new one, since the old one may hold graphs
            self.renderer = VolumeRenderer(self.field, self.occupancy, config)

    def modules(self) -> dict[str, nn.Module]:
        """The parts that have state, by name."""
        return {"field": self.field, "background": self.background, "occupancy": self.occupancy}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters by the kind of learning rate that they take."""
        return {**self.field.parameter_groups(), "background": list(self.background.parameters())}

    def state(self) -> dict[str, Tensor]:
        """All tensors, as "part.name"."""
        return {
            f"{part}.{key}": value
            for part, module in self.modules().items()
            for key, value in module.state_dict().items()
        }

    def restore(self, group: Callable[[str], Mapping[str, Tensor]]) -> None:
        """Undo `state`.

        Args:
            group: the tensors of a part, by names without the part's.

        Raises:
            RuntimeError: something lacks, or has another shape.
        """
        for part, module in self.modules().items():
            module.load_state_dict(group(part))

    def check_parameters(self, when: str, advice: str = "") -> None:
        """Raise NonFiniteError if a parameter is not finite; waits for the GPU.

        Args:
            when, advice: ends of the message.
        """
        for part, module in self.modules().items():
            for name, parameter in module.named_parameters():
                # The sum is not finite where one element is not, and needs no mask of the table's size.
                if not math.isfinite(float(parameter.detach().double().sum())):
                    raise NonFiniteError(f"the parameters {part}.{name} hold a NaN or an infinity {when}{advice}")

    @torch.no_grad()
    def render(
        self,
        cameras: Cameras,
        size: int,
        shading: Shading | str = Shading.ALBEDO,
        ambient: float = 0.3,
        diffuse: float = 0.7,
    ) -> Tensor:
        """Pictures `[B, size, size, 3]` on white, float32 in [0, 1], lit from above if the shading needs a light."""
        cameras, light = cameras.to(self.device), None
        if Shading.parse(shading).needs_normals:
            light = per_view(cameras.positions + torch.tensor([0.5, 1.0, 0.0], device=self.device), size * size)
        rays, white = self.renderer.prepare(cameras, size), torch.ones(3, device=self.device)
        output = self.renderer.render(rays, white, shading, light, ambient=ambient, diffuse=diffuse)
        return output.color.view(-1, size, size, 3)
