"""Does the latent prior hear what it is told? Losses on unseen views, and pictures to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from prior_data.batches import CatalogueSampler
from prior_data.captions import VIEWS
from prior_data.colours import COLOURS
from prior_data.probe import PROBE_TIMES, variants
from torch import Tensor, nn
from training_loop import seed_step

from dreamfusion_fast.guidance.methods.cfg import guided
from dreamfusion_fast.guidance.models.embedded.model import TRAIN_TIMESTEPS

from .autoencoder import decode, encode
from .diffusion import v_errors
from .latents import caption_tokens
from .networks import LATENT_CHANNELS, LATENT_SIZE, Precision

_STREAM = 5
# Rows of `prior_data.probe.variants` that differ in the caption alone, under the names they have here.
_CAPTIONS = {
    "all right": "all right",
    "no caption": "no caption",
    "wrong name": "wrong name",
    "wrong colour": "wrong colour",
    "no camera, right suffix": "right view word",
    "no camera, wrong suffix": "wrong view word",
}


@torch.no_grad()
def probe(
    vae: Any, unet: nn.Module, sampler: CatalogueSampler, alphas_cumprod: Tensor, precision: Precision, n: int = 2048
) -> dict[str, dict[str, float]]:
    """Error of v per kind of caption at `PROBE_TIMES`, on held-out views with the same noise for every row.

    "wrong colour" and "right colour" are over the samples whose caption can name a colour; captions carry a view word
    in the two rows of that name alone.
    """
    seed_step(0, _STREAM, 0)
    images, parts = sampler.pictures(*sampler.draw(n, held_out=True))
    scale = vae.config.scaling_factor
    latents = torch.cat([encode(vae, part, precision) for part in images.split(512)]) * scale
    noise = torch.randn_like(latents)
    coloured = (parts.word > 0) & (parts.word <= len(COLOURS))
    everyone = torch.ones_like(coloured)
    rows: dict[str, dict[str, float]] = {}
    for name, changed in variants(parts, sampler).items():
        if name not in _CAPTIONS:
            continue
        tokens = caption_tokens(sampler, changed)
        if name == "all right":
            rows["right colour"] = {}
        rows[_CAPTIONS[name]] = {}
        for t in PROBE_TIMES:
            timestep = torch.full((n,), int(t * TRAIN_TIMESTEPS), device=sampler.device)
            errors = torch.cat(
                [
                    v_errors(unet, latents[p], noise[p], timestep[p], tokens[p], alphas_cumprod, precision)
                    for p in torch.arange(n, device=sampler.device).split(512)
                ]
            )
            rows[_CAPTIONS[name]][f"t={t}"] = _mean(errors, coloured if name == "wrong colour" else everyone)
            if name == "all right":
                rows["right colour"][f"t={t}"] = _mean(errors, coloured)
    return rows


def _mean(errors: Tensor, keep: Tensor) -> float:
    return round(errors[keep].mean().item(), 5)


@torch.no_grad()
def sample(
    vae: Any,
    unet: nn.Module,
    scheduler: Any,
    null: Tensor,
    tokens: Tensor,
    noise: Tensor,
    precision: Precision,
    scale: float = 3.0,
    steps: int = 40,
) -> Tensor:
    """Images by DDIM (Song et al. 2021, arXiv 2010.02502) without added noise.

    Args:
        null: `[1, 20, 384]` token states of the empty caption.
        tokens: `[n, 20, 384]`.
        noise: `[n, 4, 16, 16]`.
        scale: s in null + s (text - null).

    Returns:
        `[n, 3, 64, 64]` float32, about [-1, 1].
    """
    scheduler.set_timesteps(steps, device=noise.device)
    states, x = torch.cat([null.expand_as(tokens), tokens]), noise
    for t in scheduler.timesteps:
        with precision():
            pair = unet(torch.cat([x, x]), t, states, return_dict=False)[0]
        without, with_text = pair.float().chunk(2)
        x = scheduler.step(guided(without, with_text, scale), t, x).prev_sample
    return decode(vae, x / vae.config.scaling_factor, precision)


def sample_sheet(
    vae: Any,
    unet: nn.Module,
    scheduler: Any,
    encoder: nn.Module,
    precision: Precision,
    prompts: tuple[str, ...],
    scale: float = 3.0,
    steps: int = 40,
    seed: int = 0,
) -> Image.Image:
    """One row per prompt: two samples without a view word, then one per view word."""
    columns = ["", *VIEWS]
    captions = [f"{prompt}, {view}" if view else prompt for prompt in prompts for view in columns]
    tokens = encoder(["", *captions])[0]
    shape = (len(captions), LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(tokens.device)
    return sheet(
        sample(vae, unet, scheduler, tokens[:1], tokens[1:], noise, precision, scale, steps), columns=len(columns)
    )


def save_sheet(picture: Image.Image, path: Path) -> None:
    """As its name ends; JPEG in good quality, so that what a call leaves stays small."""
    picture.save(path, **({"quality": 92, "subsampling": 0} if path.suffix == ".jpg" else {}))


def sheet(images: Tensor, columns: int) -> Image.Image:
    """Images `[rows * columns, 3, 64, 64]` in [-1, 1], row by row."""
    tiles = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    _, height, width, channels = tiles.shape
    rows = tiles.reshape(-1, columns, height, width, channels).swapaxes(1, 2)
    return Image.fromarray(np.ascontiguousarray(rows.reshape(-1, columns * width, channels)))
