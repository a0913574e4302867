"""View-dependent prompts (DreamFusion, Poole et al. 2022, section 3.2).

The text that guides a view names the side it shows: elevation above 60 degrees is "overhead view", otherwise azimuth
within 45 degrees of the front is "front view", beyond 135 degrees "back view", and "side view" between.
"""

from __future__ import annotations

import math
import re
import warnings
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

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


class Prompt(NamedTuple):
    """A text and the direction that it names, apart, so that a text that is too long can lose words and not the view.

    Attributes:
        text: without the direction.
        view: one of `VIEW_NAMES`, or None.
    """

    text: str
    view: str | None = None

    @property
    def ending(self) -> str:
        """The words that the direction adds: ", side view", or nothing."""
        return "" if self.view is None else f", {self.view} view"

    def __str__(self) -> str:
        return self.text + self.ending


@dataclass(frozen=True)
class PromptSet:
    """A prompt, its view-dependent texts and the text of the unconditional half.

    Args:
        prompt: what to make, for example "an armchair"; surrounding white space is dropped.
        negative_prompt: text of the unconditional half; empty for plain classifier-free guidance.
        view_dependent: append ", front view" and so on; otherwise every view is guided by the prompt as it is.
        dropped: direction -> words or phrases of the prompt that its text goes without, upper or lower case.

    Raises:
        UserError: the prompt is empty, or all of it is dropped.
    """

    prompt: str
    negative_prompt: str = ""
    view_dependent: bool = True
    dropped: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise UserError(f'the prompt is empty (got {self.prompt!r}): say what to make, for example "an armchair"')
        object.__setattr__(self, "prompt", " ".join(self.prompt.split()))
        object.__setattr__(self, "negative_prompt", " ".join(self.negative_prompt.split()))
        for name in self.dropped:
            if not self._text(name):
                raise UserError(
                    f"nothing is left of the prompt {self.prompt!r} without the words dropped in {name} views"
                )

    @property
    def texts(self) -> list[Prompt]:
        """The five texts to embed: one per entry of `VIEW_NAMES`, then the unconditional one."""
        views = [Prompt(self._text(name), name if self.view_dependent else None) for name in VIEW_NAMES]
        return [*views, Prompt(self.negative_prompt)]

    def _text(self, view: str) -> str:
        """The prompt without what is dropped in this view."""
        text = self.prompt
        for words in self.dropped.get(view, ()):
            text = re.sub(rf"(?<!\w){re.escape(words)}(?!\w)", " ", text, flags=re.IGNORECASE)
        return re.sub(r"\s+([,.;])", r"\1", " ".join(text.split())).strip(" ,;")


def dropped_words(text: str) -> dict[str, list[str]]:
    """Words by direction, as "back: face, smiling; overhead: face" lists them.

    Raises:
        ValueError: an unknown direction, or one without words.
    """
    dropped: dict[str, list[str]] = {}
    for part in filter(str.strip, text.split(";")):
        name, _, words = part.partition(":")
        found = [" ".join(word.split()) for word in words.split(",") if word.strip()]
        if name.strip() not in VIEW_NAMES or not found:
            raise ValueError(f"{part.strip()!r} is not one of {', '.join(VIEW_NAMES)}, a colon and words")
        dropped.setdefault(name.strip(), []).extend(found)
    return dropped


def shortened(prompts: Sequence[Prompt], fits: Callable[[str], bool]) -> tuple[list[str], dict[str, str]]:
    """Texts that fit a text encoder: where one does not, its last words are left out, and not its direction.

    All views of a prompt lose the same words, so that their texts differ in the view alone. A single word that is too
    long, as a text in Chinese can be, is cut between two characters.

    Args:
        prompts: texts and directions.
        fits: whether a text is short enough.

    Returns:
        The texts, in their order; and of each prompt that had to be shortened, what was left out.
    """
    endings: dict[str, list[str]] = {}
    for prompt in prompts:
        endings.setdefault(prompt.text, []).append(prompt.ending)
    kept = {text: _longest_start(text, own, fits) for text, own in endings.items()}
    lost = {text: text[len(start) :].strip() for text, start in kept.items() if start != text}
    return [kept[prompt.text] + prompt.ending for prompt in prompts], lost


def warn_of_lost_words(name: str, most: int, lost: Mapping[str, str]) -> None:
    """A warning per prompt that was `shortened`: the guidance called `name` reads `most` tokens of one."""
    for prompt, words in lost.items():
        warnings.warn(
            f"guidance {name!r} reads at most {most} tokens of a prompt: of {prompt!r} it does not see {words!r}",
            stacklevel=4,
        )


def _longest_start(prompt: str, endings: Sequence[str], fits: Callable[[str], bool]) -> str:
    """`prompt` if it fits with all endings, else as many of its words, or of its first word's characters, as do."""

    def too_long(end: int) -> bool:
        return not all(fits(prompt[:end] + ending) for ending in endings)

    if not too_long(len(prompt)):
        return prompt
    ends: Sequence[int] = [match.end() for match in re.finditer(r"\S+", prompt)]
    if ends and too_long(ends[0]):
        ends = range(ends[0])
    count = bisect_left(ends, True, key=too_long)
    return prompt[: ends[count - 1]] if count else ""


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
    angle = from_front(azimuth)
    index = torch.ones_like(azimuth, dtype=torch.int64)
    index = index.masked_fill(angle <= math.radians(FRONT_LIMIT_DEG) + _TOLERANCE, 0)
    index = index.masked_fill(angle >= math.radians(BACK_LIMIT_DEG) - _TOLERANCE, 2)
    return index.masked_fill(is_overhead(elevation), 3)


def view_shares(azimuth: Tensor, elevation: Tensor) -> Tensor:
    """Share of each of `VIEW_NAMES` in a view whose prompt is interpolated, computed on the device of its input.

    From the front to the side and from there to the back, shares change linearly with the azimuth, as in
    stable-dreamfusion. There is nothing between these and "overhead".

    Args:
        azimuth: [B] radians, any multiple of 2 pi allowed; 0 is the front.
        elevation: [B] radians above the horizon.

    Returns:
        [B, 4], dtype of the azimuth; each row adds up to 1.
    """
    quarter = from_front(azimuth) / (math.pi / 2)  # 0 front, 1 side, 2 back
    overhead = is_overhead(elevation)
    sides = torch.stack([(1 - quarter).clamp_min(0), 1 - (quarter - 1).abs(), (quarter - 1).clamp_min(0)], dim=1)
    sides = sides.masked_fill(overhead[:, None], 0.0)
    return torch.cat([sides, overhead[:, None].to(sides.dtype)], dim=1)


def from_front(azimuth: Tensor) -> Tensor:
    """Angle between an azimuth and the front, either way around: 0 to pi, radians."""
    return torch.remainder(azimuth + math.pi, 2 * math.pi).sub(math.pi).abs()


def is_overhead(elevation: Tensor) -> Tensor:
    """Whether a view at this elevation, radians, is an overhead view."""
    return elevation > math.radians(OVERHEAD_LIMIT_DEG) + _TOLERANCE
