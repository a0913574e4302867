"""Pictures from the embedded prior without any 3D: what it knows can be looked at before it is distilled."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance.methods.cfg import guided
from dreamfusion_fast.guidance.prompts import Prompt

from .guide import EmbeddedPrior
from .model import IMAGE_SIZE, ViewCondition, noise_schedule


@torch.no_grad()
def sample_images(
    prompt: str, n: int = 9, seed: int = 0, guidance_scale: float = 3.0, steps: int = 40, device: str = "cpu"
) -> np.ndarray:
    """Draw images on white by DDIM (Song et al. 2021, arXiv 2010.02502).

    A view named in the prompt (", side view") is heard from the text; otherwise the cameras go around the object, the
    first at the front left.

    Args:
        prompt: what to draw.
        n: how many images.
        seed: of the noise, drawn on the CPU: the same on every device up to rounding.
        guidance_scale: s in null + s (text - null).
        steps: denoising steps.
        device: where the network runs.

    Returns:
        uint8 `[n, 64, 64, 3]`.

    Raises:
        UserError: an empty prompt, or n or steps below 1.
    """
    if not prompt.strip():
        raise UserError('the prompt is empty: say what to draw, for example "an armchair, side view"')
    if n < 1 or steps < 1:
        raise UserError(f"n and steps must be at least 1, got {n} and {steps}")
    model = EmbeddedPrior(device)
    embedded = model.embed_texts([Prompt(""), Prompt(prompt)])
    pair = {name: value.repeat_interleave(n, dim=0).to(device) for name, value in embedded.items()}
    known = ViewCondition(
        background=torch.ones(n, 3, device=device), shading=torch.zeros(n, dtype=torch.long, device=device)
    )
    if " view" not in prompt:
        azimuth = torch.arange(n, device=device) * (2 * math.pi / n) - math.pi / 6
        known = dataclasses.replace(known, azimuth=azimuth, elevation=torch.full_like(azimuth, math.radians(20)))
    scheduler = noise_schedule()
    scheduler.set_timesteps(steps, device=device)
    noise = torch.randn(n, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))
    x = noise.to(device)
    for t in scheduler.timesteps:
        null, text = model.evaluate(x, t.expand(n), pair, known).float().chunk(2)
        x = scheduler.step(guided(null, text, guidance_scale), t, x).prev_sample
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
