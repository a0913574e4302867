"""A diffusion model of a distribution that is known, in float64, and its levels in plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dreamfusion_fast.guidance import DiffusionModel, GuidanceConfig, PromptEmbeddings, ScoreDistillation, Views
from dreamfusion_fast.guidance.models.schedule import VariancePreserving
from dreamfusion_fast.guidance.prompts import Prompt

SIZE, STEPS, SPREAD = 4, 40, 0.6
VALUES = torch.tensor([[0.3], [-0.4], [0.9], [0.2], [-0.1]], dtype=torch.float64)
"""Means of the front, side, back and overhead prompts and of the unconditional one."""


class GaussianModel(DiffusionModel):
    """The exact model of pixels that are normal with the prompt's value as mean, and of one standard deviation.

    The prediction depends on the noisy input, and at every level in another way. Inputs are images in [-1, 1].
    """

    name = "gaussian"
    image_size = SIZE
    default_guidance_scale = 7.5
    x0_range = (-1.0, 1.0)
    text_identity = "gaussian"

    def __init__(self, prediction_type: str = "epsilon") -> None:
        self.device = torch.device("cpu")
        self.schedule = VariancePreserving(torch.linspace(0.999, 0.01, STEPS, dtype=torch.float64), prediction_type)
        self.asked: list[tuple[Tensor, Tensor, int]] = []

    def embed_texts(self, texts: list[Prompt]) -> dict[str, Tensor]:
        return {"value": VALUES}

    def encode(self, images: Tensor) -> Tensor:
        return images * 2 - 1

    def predict(self, noisy: Tensor, t: Tensor, condition: Mapping[str, Tensor], views: Views) -> Tensor:
        times = len(condition["value"]) // len(noisy)
        self.asked.append((noisy, t, times))
        level = self.schedule.at(t.repeat(times), torch.float64)
        noise = epsilon(noisy.repeat(times, 1, 1, 1), level.alpha, level.sigma, condition["value"].view(-1, 1, 1, 1))
        clean = (noisy.repeat(times, 1, 1, 1) - level.sigma * noise) / level.alpha
        return {"epsilon": noise, "v_prediction": level.alpha * noise - level.sigma * clean, "sample": clean}[
            self.schedule.prediction_type
        ]


def epsilon(noisy: Tensor, alpha: Tensor | float, sigma: Tensor | float, mean: Tensor | float) -> Tensor:
    """The expected noise in `noisy` = alpha x + sigma n, for x normal with this mean and deviation `SPREAD`."""
    return sigma * (noisy - alpha * mean) / (alpha**2 * SPREAD**2 + sigma**2)


def level(t: int) -> tuple[float, float]:
    """alpha and sigma of the model's timestep t."""
    abar = 0.999 + (0.01 - 0.999) * t / (STEPS - 1)
    return math.sqrt(abar), math.sqrt(1 - abar)


def views() -> Views:
    """A back, a front and an overhead view; `TEXTS` are the means of their prompts."""
    return Views(torch.tensor([math.pi, 0.0, 1.0]), torch.tensor([0.0, 0.1, math.radians(80)]))


TEXTS, NULL = [0.9, 0.3, 0.2], -0.1


def images() -> Tensor:
    return torch.rand(3, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(8))


def distillation(prediction_type: str = "epsilon", **settings: object) -> ScoreDistillation:
    """Distillation of a `GaussianModel` without clamping, and its settings."""
    config = GuidanceConfig(cache=False, **settings)  # type: ignore[arg-type]
    return ScoreDistillation(GaussianModel(prediction_type), config)


def embeddings() -> PromptEmbeddings:
    return PromptEmbeddings({"value": VALUES})
