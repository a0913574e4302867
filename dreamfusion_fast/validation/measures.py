"""What can be measured of a diffusion model without another one to compare it with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dreamfusion_fast.guidance.contract import DiffusionModel, PromptEmbeddings, Views


@torch.no_grad()
def denoising_errors(
    model: DiffusionModel,
    prompts: Sequence[tuple[PromptEmbeddings, str]],
    clean: Tensor,
    views: Views,
    fraction: float,
    generator: torch.Generator,
) -> list[float]:
    """How well the model tells the noise in noisy inputs, under each of several prompts and with the same noise.

    Args:
        model: who tells.
        prompts: embeddings and the condition of them, "text" or "null".
        clean: inputs of the model `[B, C, h, w]`, float32.
        views: B of them.
        fraction: noise level, as a fraction of the schedule's steps.
        generator: of the noise, on the CPU.

    Returns:
        For each prompt the mean square of the noise that it tells less the noise that was added, over that of the best
        linear guess by one who knows nothing but the variance v of the inputs, alpha^2 v / (alpha^2 v + sigma^2). A
        model that has learnt anything about such inputs is below 1.
    """
    steps = model.schedule.steps
    t = torch.full((len(clean),), min(round(fraction * steps), steps - 1), device=clean.device)
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    level = model.schedule.at(t, clean.dtype)
    noisy = level.noisy(clean, noise)
    signal = level.alpha[0].square() * clean.square().mean()
    by_guess = (signal / (signal + level.sigma[0].square())).squeeze()
    errors = []
    for embeddings, condition in prompts:
        output = model.predict(noisy, t, embeddings.select((condition,), views), views).to(clean.dtype)
        error = level.error(output, noisy, clean, noise).square().mean()
        errors.append(float(error / by_guess.clamp_min(1e-12)))
    return errors


def place_of_first(model_errors: Sequence[Sequence[float]]) -> int:
    """The place, from 1, of the first prompt by its mean over noise levels, least error first.

    A diffusion model tells what is in a picture by which text explains its noise best (Li et al. 2023, arXiv
    2303.16203).

    Args:
        model_errors: for each noise level the error under each prompt.
    """
    means = [sum(column) / len(column) for column in zip(*model_errors, strict=True)]
    return 1 + sum(mean <= means[0] for mean in means[1:])


def colour_statistics(images: Tensor, opacity: Tensor) -> dict[str, float]:
    """Of the object in renders on white, by its opacity.

    Args:
        images: `[B, S, S, 3]` in [0, 1].
        opacity: `[B, S, S]`.

    Returns:
        "covered": mean opacity. Of pixels more than half covered: "saturated", the share of channels below 0.02 or
        above 0.98; "colourfulness", the mean of the largest channel less the smallest; "contrast", the standard
        deviation of the brightness. NaN where nothing is covered.
    """
    inside = images[opacity > 0.5]
    brightness = inside.mean(dim=1)
    return {
        "covered": float(opacity.mean()),
        "saturated": float(((inside < 0.02) | (inside > 0.98)).float().mean()),
        "colourfulness": float((inside.amax(dim=1) - inside.amin(dim=1)).mean()) if len(inside) else float("nan"),
        "contrast": float(brightness.std()) if len(inside) > 1 else float("nan"),
    }
