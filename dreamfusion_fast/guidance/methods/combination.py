"""How the predictions under several conditions become one, apart from what a method makes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dreamfusion_fast.guidance.contract import Views
from dreamfusion_fast.guidance.methods.cfg import Convention
from dreamfusion_fast.guidance.prompts import from_front, is_overhead

# f(r) = a exp(-b r) + c of Perp-Neg's negative prompts, with threestudio's numbers. Between front and side: of both;
# between side and back: of "side", then of "front".
_NEAR_FRONT = (4.0, 0.5, -2.426)
_SIDE_NEAR_BACK = (1.0, 0.5, -0.606)
_FRONT_NEAR_BACK = (1.0, 0.5, 0.967)


@dataclass(frozen=True)
class Combination:
    """Predictions `[B, ...]` of any prediction type under "null" and "text", and what else is asked for, as one.

    Args:
        scale: s of classifier-free guidance, base + s d with d = text - null (Ho and Salimans 2022, arXiv 2207.12598).
        convention: the base is the prediction under "null" or under "text".
        rescale: phi of rescaled guidance (Lin et al. 2023, arXiv 2305.08891, section 3.4): the result's
            standard deviation per view goes by this share to that of the prediction under "text". 0: not at all; theirs
            is 0.7.
        perp_neg: Perp-Neg (Armandpour et al. 2023, arXiv 2304.04968): the predictions under "front" and "side" push
            away, each by its part that is perpendicular to d, with the weights of `perp_neg_weights`.
    """

    scale: float
    convention: Convention = "null"
    rescale: float = 0.0
    perp_neg: bool = False

    @property
    def conditions(self) -> tuple[str, ...]:
        """What the model has to be asked under."""
        return ("null", "text", "front", "side") if self.perp_neg else ("null", "text")

    def direction(self, outputs: Mapping[str, Tensor], views: Views) -> Tensor:
        """d = text - null, what the text changes; with Perp-Neg d - sum_i w_i (e_i - <e_i, d> / <d, d> d).

        There e_i is what negative prompt i changes. Inner products are over all of a view's prediction.
        """
        null = outputs["null"]
        direction = outputs["text"] - null
        if not self.perp_neg:
            return direction
        size = _inner(direction, direction).clamp_min(torch.finfo(direction.dtype).tiny)
        result = direction
        weights = perp_neg_weights(views.azimuth, views.elevation).to(direction.device, direction.dtype)
        for name, weight in zip(("front", "side"), weights.unbind(dim=1), strict=True):
            away = outputs[name] - null
            result = result - weight.view(-1, 1, 1, 1) * (away - _inner(away, direction) / size * direction)
        return result

    def __call__(self, outputs: Mapping[str, Tensor], views: Views) -> Tensor:
        """All predictions as one."""
        result = outputs[self.convention] + self.scale * self.direction(outputs, views)
        if not self.rescale:
            return result
        wanted, found = (x.flatten(1).std(dim=1).view(-1, 1, 1, 1) for x in (outputs["text"], result))
        factor = wanted / found.clamp_min(torch.finfo(result.dtype).tiny)
        return result * (self.rescale * factor + (1 - self.rescale))

    def at_scale(self, scale: float) -> Combination:
        """The same with another scale, in the "null" convention, and not rescaled."""
        return replace(self, scale=scale, convention="null", rescale=0.0)


def perp_neg_weights(azimuth: Tensor, elevation: Tensor) -> Tensor:
    """Weights of Perp-Neg's negative prompts "front" and "side" for each view.

    At r from the side (0) to the front (1), "front" has f(r) and "side" f(1 - r) with f(r) = 4 exp(-r / 2) - 2.426; at
    r from the back (0) to the side (1), "side" has exp(-r / 2) - 0.606 and "front" exp(-r / 2) + 0.967. So a prompt
    that is the view's own has none. The numbers are threestudio's. Overhead views have no negative prompt.

    Args:
        azimuth: [B] radians, any multiple of 2 pi allowed; 0 is the front.
        elevation: [B] radians above the horizon.

    Returns:
        [B, 2], on the device and in the dtype of the azimuth.
    """
    quarter = from_front(azimuth) / (math.pi / 2)  # 0 front, 1 side, 2 back
    near_front = quarter < 1
    front = torch.where(near_front, _decay(_NEAR_FRONT, 1 - quarter), _decay(_FRONT_NEAR_BACK, 2 - quarter))
    side = torch.where(near_front, _decay(_NEAR_FRONT, quarter), _decay(_SIDE_NEAR_BACK, 2 - quarter))
    return torch.stack([front, side], dim=1).masked_fill(is_overhead(elevation)[:, None], 0.0)


def _decay(numbers: tuple[float, float, float], r: Tensor) -> Tensor:
    a, b, c = numbers
    return a * torch.exp(-b * r) + c


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(dim=1).view(-1, 1, 1, 1)
