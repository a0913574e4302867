"""Pictures from the embedded prior without any 3D: what it knows can be looked at before it is distilled."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import torch

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance.methods.cfg import guided
from dreamfusion_fast.guidance.prompts import Prompt

from .guide import EmbeddedPrior
from .model import IMAGE_SIZE, ViewCondition, noise_schedule


@torch.no_grad()
def sample_images(
    prompt: str,
    n: int = 9,
    seed: int = 0,
    guidance_scale: float = 3.0,
    steps: int = 40,
    device: str = "cpu",
    folder: Path | None = None,
) -> np.ndarray:
    """Draw images on white by DDIM (Song et al. 2021, arXiv 2010.02502).

    A view named in the prompt (", side view") is heard from the text; otherwise the cameras go around the object, the
    first at the front left. Weights for groups of views then show one object in each image: a row of so many views
    evenly around it, the front first.

    Args:
        prompt: what to draw.
        n: how many images.
        seed: of the noise, drawn on the CPU: the same on every device up to rounding.
        guidance_scale: s in null + s (text - null).
        steps: denoising steps.
        device: where the network runs.
        folder: weights, as `EmbeddedPrior` takes them; None: the package's own.

    Returns:
        uint8 `[n, 64, 64, 3]`, of groups `[n, 64, 64 * views, 3]`.

    Raises:
        UserError: an empty prompt, or n or steps below 1.
    """
    if not prompt.strip():
        raise UserError('the prompt is empty: say what to draw, for example "an armchair, side view"')
    if n < 1 or steps < 1:
        raise UserError(f"n and steps must be at least 1, got {n} and {steps}")
    model = EmbeddedPrior(device) if folder is None else EmbeddedPrior(device, folder=folder)
    turned = " view" not in prompt
    group = model.views_per_group if turned else 1
    images = n * group
    embedded = model.embed_texts([Prompt(""), Prompt(prompt)])
    pair = {name: value.repeat_interleave(images, dim=0).to(device) for name, value in embedded.items()}
    known = ViewCondition(
        background=torch.ones(images, 3, device=device), shading=torch.zeros(images, dtype=torch.long, device=device)
    )
    if turned:
        if group == 1:
            azimuth = torch.arange(n, device=device) * (2 * math.pi / n) - math.pi / 6
        else:
            azimuth = (torch.arange(group, device=device) * (2 * math.pi / group)).repeat(n)
        known = dataclasses.replace(known, azimuth=azimuth, elevation=torch.full_like(azimuth, math.radians(20)))
    scheduler = noise_schedule()
    scheduler.set_timesteps(steps, device=device)
    noise = torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))
    x = noise.to(device)
    for t in scheduler.timesteps:
        null, text = model.evaluate(x, t.expand(images), pair, known, group).float().chunk(2)
        x = scheduler.step(guided(null, text, guidance_scale), t, x).prev_sample
    pictures = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    return pictures.unflatten(0, (n, group)).transpose(1, 2).flatten(2, 3).cpu().numpy()
