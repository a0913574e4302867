"""Which pixels of a soft render are meant to show the object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from dreamfusion_fast.settings import Range, Settings

# A structure is thin if nothing of it is left where pictures are opened by a square of this share of their height.
_THIN = 0.1


@dataclass(frozen=True)
class OpaqueThresholds(Settings):
    """Opacities from which on a pixel is to be opaque; below, it is to be empty."""

    wide: Annotated[float, Range(0, 1, open="both")] = 0.4
    """Of a pixel anywhere. Far below a half, soft edges become part of the object, and it swells."""
    thin: Annotated[float, Range(0, 1, open="both")] = 0.25
    """Of a pixel on something thin, such as a leg, a stem or a branch. Those have no core that is dense, since score
    distillation only half believes in them, and they would be lost with the other threshold."""

    def check_together(self) -> None:
        if self.thin > self.wide:
            self.refuse("thin", "wide", want="thin <= wide")

    def wanted(self, opacity: Tensor) -> Tensor:
        """Which pixels are to be opaque, bool `[B, H, W]`, of opacities `[B, H, W]`.

        Something is thin where a morphological opening (the largest of the smallest values around; Serra 1982) takes
        half of its opacity away: it is narrower than a tenth of the picture. The soft edge of something wide is not.
        """
        size = 2 * max(round(0.5 * _THIN * opacity.shape[1]), 1) + 1
        images = opacity.detach()[:, None]
        eroded = -F.max_pool2d(-images, size, 1, size // 2)
        opened = F.max_pool2d(eroded, size, 1, size // 2)
        thin = (images > self.thin) & (opened < 0.5 * images)
        return ((images > self.wide) | thin)[:, 0]


def cross_entropy(opacity: Tensor, wanted: Tensor, least: float) -> Tensor:
    """Mean binary cross entropy of opacities `[n]` with what they are to be, bool `[n]`.

    Args:
        opacity: clamped to [least, 1 - least], which bounds the gradient.
        wanted: which are to be 1; the others are to be 0.
        least: above 0.
    """
    clamped = opacity.clamp(least, 1.0 - least)
    return -torch.where(wanted, clamped.log(), (1.0 - clamped).log()).mean()
