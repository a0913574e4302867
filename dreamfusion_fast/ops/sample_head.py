"""How density, colour and normal come from a network's outputs: the formulas of fields and renderers, each once.

``sample_density`` and ``sample_state`` of csrc/include/dreamfusion_fast/ray_sums.h are the same in C++, for the
streaming renderer. tests/ops/tiles/test_ray_sums_tile.py holds both together,
tests/rendering/volume/test_sample_head.py this and what fields and `shade` make of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamfusion_fast.ops._native import pointer

_ACTIVATIONS = {"softplus": 0, "exp": 1}
_SHADINGS = {"albedo": 0, "lambertian": 1, "textureless": 2}
# The constants of ray_sums.h, which has their reasons.
SHORTEST_SLOPE = 1e-4
_BLOB_CENTRE_EPS = 1e-10
_MAX_EXPONENT = 15.0


class _TruncatedExp(torch.autograd.Function):
    """exp(min(x, 15)) whose gradient does not vanish above 15, so that a runaway density can come back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clamp(max=_MAX_EXPONENT).exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * y


def truncated_exp(x: Tensor) -> Tensor:
    """exp(x), saturated at x = 15 with the gradient of the saturation point above it. Any shape."""
    return _TruncatedExp.apply(x)


def safe_normalize(vectors: Tensor, shortest: float = SHORTEST_SLOPE) -> Tensor:
    """Scale vectors to unit length, with finite values and gradients everywhere.

    Args:
        vectors: `[..., 3]`.
        shortest: vectors shorter than this are divided by it instead, so zero stays zero.
    """
    squared = vectors.square().sum(dim=-1, keepdim=True)
    return vectors * torch.rsqrt(squared.clamp(min=shortest * shortest))


@dataclass(frozen=True, kw_only=True, eq=False)
class DensityHead:
    """How a density comes from its logit.

    Attributes:
        activation: "softplus" or "exp", of the density.
        blob_scale: height of the density blob at the centre; 0: none.
        blob_width: its standard deviation (exp) or the radius where it is zero (softplus), scene units.
        ball: whether density lives in the ball (ellipsoid) inscribed in the box, or in the whole box.
    """

    activation: str = "softplus"
    blob_scale: float = 0.0
    blob_width: float = 1.0
    ball: bool = True

    def density(self, logits: Tensor, offsets: Tensor, unit: Tensor) -> Tensor:
        """Density `[n]`, zero outside the bound.

        Args:
            logits: `[n]`, without the blob.
            offsets: `[n, 3]`, from the centre of the scene box, scene units.
            unit: `[n, 3]`, positions in the scene box scaled to [0, 1]^3.
        """
        raw = logits + self._blob(offsets) if self.blob_scale != 0.0 else logits
        density = truncated_exp(raw) if self.activation == "exp" else F.softplus(raw)
        centred = 2.0 * unit.detach() - 1.0
        inside = centred.square().sum(dim=1) <= 1.0 if self.ball else (centred.abs() <= 1.0).all(dim=1)
        return torch.where(inside, density, torch.zeros_like(density))

    def _blob(self, offsets: Tensor) -> Tensor:
        squared = offsets.square().sum(dim=1)
        if self.activation == "exp":
            return self.blob_scale * torch.exp(squared * (-0.5 / self.blob_width**2))
        return self.blob_scale * (1.0 - torch.sqrt(squared + _BLOB_CENTRE_EPS) * (1.0 / self.blob_width))

    def blob_gradient(self, offsets: Tensor) -> Tensor:
        """Gradient `[n, 3]` of the blob by the position, at `offsets` `[n, 3]` from the centre."""
        if self.activation == "exp":
            return offsets * (self._blob(offsets) * (-1.0 / self.blob_width**2))[:, None]
        length = torch.sqrt(offsets.square().sum(dim=1, keepdim=True) + _BLOB_CENTRE_EPS)
        return offsets * (-self.blob_scale / self.blob_width) / length


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleHead(DensityHead):
    """How a network's outputs become density, colour and normal.

    Attributes:
        centre, extent: of the scene box, scene units.
        shading: "albedo", "lambertian" or "textureless".
        ambient, diffuse: strengths of the light.
        light: position `[3]` or `[n_rays, 3]`, contiguous; None with albedo shading.
    """

    centre: tuple[float, float, float]
    extent: tuple[float, float, float]
    shading: str = "albedo"
    ambient: float = 0.1
    diffuse: float = 0.9
    light: Tensor | None = None

    @cached_property
    def arguments(self) -> tuple[Any, ...]:
        """As the native core takes it."""
        stride = 3 if self.light is not None and self.light.dim() == 2 else 0
        return (
            self.centre,
            self.extent,
            _ACTIVATIONS[self.activation],
            self.blob_scale,
            self.blob_width,
            self.ball,
            _SHADINGS[self.shading],
            self.ambient,
            self.diffuse,
            pointer(self.light),
            stride,
        )


def lit_color(
    albedo: Tensor, normal: Tensor, positions: Tensor, light: Tensor, textureless: bool, ambient: float, diffuse: float
) -> Tensor:
    """albedo * (ambient + diffuse * max(0, n . l)), l the unit vector to the light (DreamFusion, section 3.1).

    Args:
        albedo, normal, positions: `[n, 3]`.
        light: its position, `[3]` or `[n, 3]`.
        textureless: 1 in place of the albedo.
        ambient, diffuse: strengths of the light.
    """
    towards = F.normalize(light - positions, dim=-1)
    lit = ambient + diffuse * (normal * towards).sum(dim=-1, keepdim=True).clamp(min=0.0)
    return lit.expand_as(albedo) if textureless else albedo * lit


def sample_head_reference(
    head: SampleHead, positions: Tensor, logits: Tensor, slopes: Tensor | None, light: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Density `[n]`, colour `[n, 3]` and normal `[n, 3]` (zero without slopes) of samples; light `[3]` or `[n, 3]`.

    The twin of what the native core does to a sample; positions, logits and slopes are those of `SampleTile`.
    """
    centre, extent = logits.new_tensor(head.centre), logits.new_tensor(head.extent)
    offsets = (positions - 0.5) * extent
    density = head.density(logits[:, 0], offsets, positions)
    albedo = torch.sigmoid(logits[:, 1:4])
    if slopes is None:
        return density, albedo, torch.zeros_like(albedo)
    normal = -safe_normalize(slopes / extent + head.blob_gradient(offsets))
    if head.shading == "albedo":
        return density, albedo, normal
    assert light is not None
    textureless = head.shading == "textureless"
    return density, lit_color(albedo, normal, centre + offsets, light, textureless, head.ambient, head.diffuse), normal
