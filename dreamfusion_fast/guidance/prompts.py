"""View-dependent prompts (DreamFusion, Poole et al. 2022, section 3.2).

The text that guides a view names the side it shows: elevation above 60 degrees is "overhead view", otherwise azimuth
within 45 degrees of the front is "front view", beyond 135 degrees "back view", and "side view" between.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamfusion_fast.errors import UserError

VIEW_NAMES: tuple[str, ...] = ("front", "side", "back", "overhead")
"""Directions in the order of the rows of `PromptEmbeddings`; the unconditional row follows them."""

FRONT_LIMIT_DEG = 45.0
BACK_LIMIT_DEG = 135.0
OVERHEAD_LIMIT_DEG = 60.0
# A view written as 45 degrees and turned into float32 radians must still count as 45 degrees.
_TOLERANCE = math.radians(1e-3)


@dataclass(frozen=True)
class PromptSet:
    """A prompt, its view-dependent texts and the text of the unconditional half.

    Args:
        prompt: what to make, for example "an armchair"; surrounding white space is dropped.
        negative_prompt: text of the unconditional half; empty for plain classifier-free guidance.
        view_dependent: append ", front view" and so on; otherwise every view is guided by the prompt as it is.

    Raises:
        UserError: the prompt is empty.
    """

    prompt: str
    negative_prompt: str = ""
    view_dependent: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise UserError(f'the prompt is empty (got {self.prompt!r}): say what to make, for example "an armchair"')
        object.__setattr__(self, "prompt", " ".join(self.prompt.split()))
        object.__setattr__(self, "negative_prompt", " ".join(self.negative_prompt.split()))

    @property
    def texts(self) -> list[str]:
        """The five texts to embed: one per entry of `VIEW_NAMES`, then the unconditional one."""
        views = [view_text(self.prompt, name) if self.view_dependent else self.prompt for name in VIEW_NAMES]
        return [*views, self.negative_prompt]


def view_text(prompt: str, view: str) -> str:
    """The prompt for one direction: ("a teapot", "side") gives "a teapot, side view"."""
    if view not in VIEW_NAMES:
        raise ValueError(f"view must be one of {', '.join(VIEW_NAMES)}, got {view!r}")
    return f"{prompt}, {view} view"


def view_index(azimuth: Tensor, elevation: Tensor) -> Tensor:
    """Index into `VIEW_NAMES` for each camera, computed on the device of its input.

    Args:
        azimuth: [B] radians, any multiple of 2 pi allowed; 0 is the front.
        elevation: [B] radians above the horizon.

    Returns:
        [B] int64.
    """
    if azimuth.shape != elevation.shape or azimuth.ndim != 1:
        raise ValueError(
            f"azimuth and elevation must both have shape [B], got {tuple(azimuth.shape)} and {tuple(elevation.shape)}"
        )
    from_front = torch.remainder(azimuth + math.pi, 2 * math.pi).sub(math.pi).abs()
    index = torch.ones_like(azimuth, dtype=torch.int64)
    index = index.masked_fill(from_front <= math.radians(FRONT_LIMIT_DEG) + _TOLERANCE, 0)
    index = index.masked_fill(from_front >= math.radians(BACK_LIMIT_DEG) - _TOLERANCE, 2)
    return index.masked_fill(elevation > math.radians(OVERHEAD_LIMIT_DEG) + _TOLERANCE, 3)
