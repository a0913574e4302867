"""Backgrounds: what a ray sees where the object does not cover it.

A background is a tensor of colours or a callable from ray directions `[n_rays, 3]` to colours `[n_rays, 3]`.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from dreamfusion_fast.fields.base import check_positions


class MlpBackground(nn.Module):
    """Learned background: the frequency-encoded ray direction through a small MLP (DreamFusion, section 3.1).

    Args:
        frequencies: octaves of the encoding, sin and cos of 2^k * direction for k < frequencies.
        hidden: width of the hidden layers.
        hidden_layers: how many there are.
        generator: CPU generator that makes the initial weights reproducible.
    """

    octaves: Tensor

    def __init__(
        self, frequencies: int = 4, hidden: int = 32, hidden_layers: int = 1, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        for name, value in (("frequencies", frequencies), ("hidden", hidden), ("hidden_layers", hidden_layers)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, want at least 1")
        self.register_buffer("octaves", 2.0 ** torch.arange(frequencies), persistent=False)
        widths = [3 + 6 * frequencies] + [hidden] * hidden_layers + [3]
        modules: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layer = nn.Linear(fan_in, fan_out)
            with torch.no_grad():
                bound = 1.0 / math.sqrt(fan_in)
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.zero_()
            modules += [layer, nn.ReLU()]
        self.network = nn.Sequential(*modules[:-1])

    def forward(self, directions: Tensor) -> Tensor:
        """Colours `[n_rays, 3]` in (0, 1) for unit directions `[n_rays, 3]`."""
        check_positions(directions)
        phases = (directions[:, None, :] * self.octaves[:, None]).flatten(1)
        return torch.sigmoid(self.network(torch.cat([directions, phases.sin(), phases.cos()], dim=1)))


def random_colors(count: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
    """Random solid background colours `[count, 3]`, uniform in [0, 1]; drawn on the generator's device."""
    source = generator.device if generator is not None else torch.device(device)
    return torch.rand(count, 3, generator=generator, device=source).to(device)


def per_view(colors: Tensor, rays_per_view: int) -> Tensor:
    """Repeat one colour per view `[B, 3]` for its rays: `[B * rays_per_view, 3]`, views one after another."""
    if colors.dim() != 2 or colors.shape[1] != 3:
        raise ValueError(f"colors: got shape {list(colors.shape)}, want [B, 3]")
    return colors.repeat_interleave(rays_per_view, dim=0)
