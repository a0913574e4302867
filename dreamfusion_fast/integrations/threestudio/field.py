"""Geometry and material of threestudio as a field of this package's renderer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dreamfusion_fast.fields.base import FieldOutput
from dreamfusion_fast.fields.samples import FieldSamples
from dreamfusion_fast.integrations.threestudio.draws import RepeatedDraws
from dreamfusion_fast.ops.composite import composite


class Parts(Protocol):
    """The parts of the scene that a renderer holds."""

    @property
    def geometry(self) -> Any:
        """From points `[m, 3]` to density `[m, 1]`, features and the like."""

    @property
    def material(self) -> Any:
        """From these to colours `[m, c]`."""


@dataclass(frozen=True)
class Wanted:
    """The outputs of a render besides colour, opacity and depth.

    Attributes:
        normal: sums of weight * normal, where there are normals.
        orientation: the orientation loss of each ray, where there are normals.
        spread: sums of weight * (distance - mean distance)^2.
        samples: all that the geometry returns.
    """

    normal: bool = False
    orientation: bool = False
    spread: bool = False
    samples: bool = False


class GeometryField:
    """The field of one render.

    Its channels are `more`, the colours beyond the third, or all of them if there are fewer; `normal`; `away` and
    `away_fixed`; and `spread`, as they are wanted.

    Args:
        parts: whose geometry and material are asked.
        wanted: what else is composited.
        arguments: further ones of the material.
    """

    needs = ("positions", "t_starts", "t_ends", "viewdirs", "light_positions")

    def __init__(self, parts: Parts, wanted: Wanted | None = None, arguments: Mapping[str, Any] | None = None) -> None:
        self._parts, self._wanted, self._arguments = parts, wanted or Wanted(), dict(arguments or {})
        self._draws = RepeatedDraws()
        self._kept: list[dict[str, Any]] = []
        self.color_channels = 3

    def density(self, positions: Tensor) -> Tensor:
        """Density `[m]` at `positions` `[m, 3]`."""
        if not len(positions):
            return positions.new_zeros(0)
        density: Tensor = self._parts.geometry.forward_density(positions)
        return density.reshape(len(positions))

    def __call__(self, samples: FieldSamples) -> FieldOutput:
        """Density, colour and the wanted channels of `m` samples."""
        with self._draws.of(samples.first_ray, samples.positions.device):
            if len(samples):
                directions = samples.extras["viewdirs"]
                known, color = self._ask(samples.positions, directions, samples.extras["light_positions"])
            else:  # not every network takes an empty batch, and channels have a width without samples, too
                directions = samples.positions.new_tensor([[0.0, 0.0, 1.0]])
                known, color = self._ask(torch.zeros_like(directions), directions, directions)
                known = {name: value[:0] if _is_row(value, 1) else value for name, value in known.items()}
                directions, color = directions[:0], color[:0]
        if self._wanted.samples:
            self._kept.append(known)
        self.color_channels = color.shape[1]
        return FieldOutput(
            density=known["density"],
            color=color[:, :3] if self.color_channels >= 3 else samples.positions.new_zeros(len(samples), 3),
            channels=self._channels(samples, directions, known, color),
        )

    def samples(self) -> dict[str, Any]:
        """All that the geometry returned, chunks joined."""
        joined = dict(self._kept[-1])
        for name in joined:
            parts = [known[name] for known in self._kept]
            if all(_is_row(part, len(known["density"])) for part, known in zip(parts, self._kept, strict=True)):
                joined[name] = torch.cat(parts)
        return joined

    def _ask(self, positions: Tensor, directions: Tensor, lights: Tensor) -> tuple[dict[str, Any], Tensor]:
        material = self._parts.material
        known = self._parts.geometry(positions, output_normal=material.requires_normal)
        color = material(viewdirs=directions, positions=positions, light_positions=lights, **known, **self._arguments)
        return known, color

    def _channels(
        self, samples: FieldSamples, directions: Tensor, known: Mapping[str, Any], color: Tensor
    ) -> dict[str, Tensor]:
        channels: dict[str, Tensor] = {}
        if color.shape[1] != 3:
            channels["more"] = color[:, 3:] if color.shape[1] > 3 else color
        if "normal" in known and self._wanted.normal:
            channels["normal"] = known["normal"]
        if "normal" in known and self._wanted.orientation:
            # Weights are constants in this loss. As channels they are none: the second one takes their gradient back.
            channels["away"] = (known["normal"] * directions).sum(dim=1).clamp(min=0.0).square()
            channels["away_fixed"] = channels["away"].detach()
        if self._wanted.spread:
            channels["spread"] = self._spread(samples, known["density"])
        return channels

    @torch.no_grad()
    def _spread(self, samples: FieldSamples, density: Tensor) -> Tensor:
        """Squared distance of each sample from its ray's mean, `[m]`.

        The mean is taken as a constant: around it, the mean of squares does not change to first order.
        """
        starts, ends, rows, rays = samples.t_starts, samples.t_ends, samples.rows, samples.ray_directions
        assert starts is not None
        assert ends is not None
        assert rows is not None
        assert rays is not None
        t, length = 0.5 * (starts + ends), ends - starts
        offsets = torch.searchsorted(
            rows, torch.arange(len(rays) + 1, device=t.device, dtype=rows.dtype), out_int32=True
        )
        flat = density.detach().reshape(len(samples)).to(t.dtype)
        _, opacity, depth, _ = composite(flat, t[:, None], t, length, offsets)
        mean = depth / opacity.clamp(min=torch.finfo(t.dtype).tiny)
        return (t - mean.index_select(0, rows)).square()


def _is_row(value: Any, count: int) -> bool:
    """Whether a value is per sample."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == count
