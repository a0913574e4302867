"""Noise schedules: how an input is made noisy, and what a model's output says of the input and of the noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Weighting = Literal["sds", "uniform", "fantasia3d", "ism", "dreamtime"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]

# Keeps quotients finite where a schedule reaches alpha = 0 or sigma = 0.
_SMALL = 1e-6


@dataclass(frozen=True, eq=False)
class NoiseLevel(ABC):
    """One noise level per view: x_t = alpha x + sigma n.

    Attributes:
        alpha, sigma: [B, 1, 1, 1], in the dtype of the arithmetic.
    """

    alpha: Tensor
    sigma: Tensor

    def noisy(self, clean: Tensor, noise: Tensor) -> Tensor:
        """x_t of x and n, [B, ...] each."""
        return self.alpha * clean + self.sigma * noise

    @abstractmethod
    def clean(self, output: Tensor, noisy: Tensor) -> Tensor:
        """The x that a model's output means."""

    @abstractmethod
    def noise(self, output: Tensor, noisy: Tensor) -> Tensor:
        """The n that a model's output means."""

    def error(self, output: Tensor, noisy: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
        """The n that a model's output means less the one that was added."""
        return self.noise(output, noisy) - noise

    def error_of_clean(self, estimate: Tensor, clean: Tensor) -> Tensor:
        """`error` of a model whose estimate of x is given, without the cancellation."""
        return self.alpha / self.sigma.clamp_min(_SMALL) * (clean - estimate)

    def noise_of_clean(self, estimate: Tensor, noisy: Tensor) -> Tensor:
        """The n that an estimate of x means."""
        return (noisy - self.alpha * estimate) / self.sigma.clamp_min(_SMALL)

    @abstractmethod
    def output(self, clean: Tensor, noise: Tensor) -> Tensor:
        """The output that means x and n: what a model is trained to say."""

    def weight(self, weighting: Weighting) -> Tensor:
        """w(t): "sds" sigma^2, "uniform" 1, "fantasia3d" alpha sigma^2, "ism" sigma / alpha.

        Raises:
            ValueError: "dreamtime", which is no function of the level but of t.
        """
        if weighting == "sds":
            return self.sigma**2
        if weighting == "uniform":
            return torch.ones_like(self.sigma)
        if weighting == "fantasia3d":
            return self.alpha * self.sigma**2
        if weighting == "ism":
            return self.sigma / self.alpha.clamp_min(_SMALL)
        raise ValueError(f"weighting: got {weighting!r}, want one that depends on the noise level alone")


class EpsilonLevel(NoiseLevel):
    """The model's output is n."""

    def clean(self, output: Tensor, noisy: Tensor) -> Tensor:
        return (noisy - self.sigma * output) / self.alpha.clamp_min(_SMALL)

    def noise(self, output: Tensor, noisy: Tensor) -> Tensor:
        return output

    def output(self, clean: Tensor, noise: Tensor) -> Tensor:
        return noise


class VelocityLevel(NoiseLevel):
    """The model's output is v = alpha n - sigma x, with alpha^2 + sigma^2 = 1 (Salimans and Ho 2022)."""

    def clean(self, output: Tensor, noisy: Tensor) -> Tensor:
        return self.alpha * noisy - self.sigma * output

    def noise(self, output: Tensor, noisy: Tensor) -> Tensor:
        return self.sigma * noisy + self.alpha * output

    def output(self, clean: Tensor, noise: Tensor) -> Tensor:
        return self.alpha * noise - self.sigma * clean


class SampleLevel(NoiseLevel):
    """The model's output is x."""

    def clean(self, output: Tensor, noisy: Tensor) -> Tensor:
        return output

    def noise(self, output: Tensor, noisy: Tensor) -> Tensor:
        return self.noise_of_clean(output, noisy)

    def output(self, clean: Tensor, noise: Tensor) -> Tensor:
        return clean

    def error(self, output: Tensor, noisy: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
        return self.error_of_clean(output, clean)


_LEVELS: dict[str, type[NoiseLevel]] = {
    "epsilon": EpsilonLevel,
    "v_prediction": VelocityLevel,
    "sample": SampleLevel,
}


class NoiseSchedule(ABC):
    """Noise levels by the time that a model is told.

    Attributes:
        steps: number of timesteps T; times are 0 to T - 1.
    """

    steps: int

    @abstractmethod
    def at(self, t: Tensor, dtype: torch.dtype) -> NoiseLevel:
        """The levels at timesteps `[B]` int64, in `dtype`, on the schedule's device."""


class VariancePreserving(NoiseSchedule):
    """alpha^2 + sigma^2 = 1 (Ho et al. 2020).

    Args:
        alphas_cumprod: [T] float32 or float64, alpha^2, falling.
        prediction_type: what the model's output is: n ("epsilon"), v ("v_prediction") or x ("sample").
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: PredictionType) -> None:
        if prediction_type not in _LEVELS:
            raise ValueError(f"prediction_type: got {prediction_type!r}, want one of {', '.join(_LEVELS)}")
        self.alphas_cumprod, self.prediction_type = alphas_cumprod, prediction_type
        self.steps = len(alphas_cumprod)

    def at(self, t: Tensor, dtype: torch.dtype) -> NoiseLevel:
        """See `NoiseSchedule.at`."""
        abar = self.alphas_cumprod[t].to(dtype).view(-1, 1, 1, 1)
        return _LEVELS[self.prediction_type](abar.sqrt(), (1 - abar).clamp_min(0).sqrt())
