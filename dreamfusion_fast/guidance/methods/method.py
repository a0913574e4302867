"""The interface of a distillation method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from dreamfusion_fast.guidance.methods.cfg import Convention, guided
from dreamfusion_fast.guidance.models.schedule import NoiseLevel


@dataclass(frozen=True, eq=False)
class Predictions:
    """A model's answers to one noisy input, under several conditions.

    Attributes:
        outputs: condition -> [B, C, h, w], as the model gave them.
        clean, noise, noisy: [B, C, h, w], the input x, the noise n, and x_t of both.
        level: the noise level of each view.
        scale, convention: of classifier-free guidance.
        x0_range: what estimates of x are clamped to; None: they are not.
    """

    outputs: Mapping[str, Tensor]
    clean: Tensor
    noise: Tensor
    noisy: Tensor
    level: NoiseLevel
    scale: float
    convention: Convention
    x0_range: tuple[float, float] | None

    @cached_property
    def guided(self) -> Tensor:
        """Classifier-free guidance of the outputs with and without text."""
        return guided(self.outputs["null"], self.outputs["text"], self.scale, self.convention)

    @cached_property
    def x0(self) -> Tensor:
        """The guided estimate of x, clamped if that is on."""
        x0 = self.level.clean(self.guided, self.noisy)
        return x0 if self.x0_range is None else x0.clamp(*self.x0_range)


class Method(ABC):
    """A rule that turns predictions into a pull.

    Attributes:
        conditions: what the model is asked under: "null" (the negative prompt), "text" (the prompt with the direction
            of each view), or the prompt with one direction of `VIEW_NAMES` for all views.
    """

    conditions: tuple[str, ...] = ("null", "text")

    @abstractmethod
    def residual(self, predictions: Predictions) -> Tensor:
        """[B, C, h, w]: minus the direction in which the model's input is to move; the caller weights it by w(t)."""
