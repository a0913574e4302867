"""Pictures by a diffusion model alone, through the same interface that distillation uses."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamfusion_fast.guidance.contract import DiffusionModel, PromptEmbeddings, Views
from dreamfusion_fast.guidance.methods.cfg import guided


@torch.no_grad()
def draw(
    model: DiffusionModel,
    embeddings: PromptEmbeddings,
    views: Views,
    shape: tuple[int, ...],
    *,
    scale: float,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Inputs of the model `[B, *shape]`, float32, drawn from noise by DDIM (Song et al. 2021, arXiv 2010.02502).

    Of a flow model these are the steps of Euler's method.

    Args:
        model: who draws.
        embeddings: of the prompt, on the model's device.
        views: B of them.
        shape: channels, height and width of the model's input.
        scale: s in null + s (text - null).
        steps: calls of the model.
        generator: of the noise, on the CPU.
    """
    batch, last = len(views), model.schedule.steps - 1
    rows = embeddings.select(("null", "text"), views)
    x = torch.randn(batch, *shape, generator=generator).to(model.device)
    times = [round(last * (1 - index / steps)) for index in range(steps)]
    for t, after in zip(times, [*times[1:], None], strict=True):
        at = torch.full((batch,), t, device=model.device)
        level = model.schedule.at(at, x.dtype)
        null, text = model.predict(x, at, rows, views).to(x.dtype).chunk(2)
        clean = level.clean(guided(null, text, scale), x)
        if model.x0_range is not None:
            clean = clean.clamp(*model.x0_range)
        if after is None:
            return clean
        noise = (x - level.alpha * clean) / level.sigma.clamp_min(1e-6)
        x = model.schedule.at(torch.full_like(at, after), x.dtype).noisy(clean, noise)
    raise ValueError(f"steps: got {steps}, want at least 1")
