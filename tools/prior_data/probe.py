"""Does the prior hear what it is told?

The loss on unseen views with each condition right, wrong and absent; and a sheet of samples.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dreamfusion_fast.guidance.models.embedded.model import TRAIN_TIMESTEPS, PriorNetwork, ViewCondition, noise_schedule
from dreamfusion_fast.guidance.models.embedded.text_encoder import TextEncoder
from dreamfusion_fast.guidance.prompts import view_index

from .batches import Batch, CatalogueSampler, Parts

PROBE_TIMES = (0.2, 0.4, 0.6, 0.8, 0.95)
SHEET_PROMPTS = (
    "a chair", "a table", "a potted cactus", "an armchair", "a teapot", "a red car", "a sofa", "a grand piano",
    "a guitar", "a bed", "a bicycle", "a dog", "a blue couch", "an automobile", "a lamp", "a clay chair",
)  # fmt: skip
SHEET_AZIMUTHS = (0, 45, 90, 180, 225, 300)


def variants(parts: Parts, sampler: CatalogueSampler) -> dict[str, Parts]:
    """The same pictures told rightly, wrongly and not at all, by name of the variant."""
    n, device = len(parts.phrase), sampler.device
    view = parts.view
    every, none = torch.ones(n, dtype=torch.bool, device=device), torch.zeros(n, dtype=torch.bool, device=device)
    right_suffix = 1 + view_index(view.azimuth, view.elevation)
    wrong_suffix = torch.where(right_suffix == 1, 3, torch.where(right_suffix == 3, 1, 1 + right_suffix % 4))
    shuffled = torch.roll(parts.phrase, 1)
    coloured = torch.where(parts.word == 0, 4, parts.word)  # the wrong word must differ and name a colour
    told = dataclasses.replace(view, camera_known=every, background_known=every, shading_known=every)
    blind = dataclasses.replace(told, camera_known=none)
    base = dataclasses.replace(parts, null=none, suffix=torch.zeros_like(right_suffix), view=told)
    assert view.azimuth is not None
    assert view.background is not None
    return {
        "all right": base,
        "no caption": dataclasses.replace(base, null=every),
        "wrong name": dataclasses.replace(base, phrase=shuffled),
        "wrong colour": dataclasses.replace(base, word=1 + (coloured + 4) % 11),
        "opposite camera": dataclasses.replace(base, view=dataclasses.replace(told, azimuth=view.azimuth + math.pi)),
        "no camera": dataclasses.replace(base, view=blind),
        "no camera, right suffix": dataclasses.replace(base, suffix=right_suffix, view=blind),
        "no camera, wrong suffix": dataclasses.replace(base, suffix=wrong_suffix, view=blind),
        "no background": dataclasses.replace(base, view=dataclasses.replace(told, background_known=none)),
        "wrong background": dataclasses.replace(base, view=dataclasses.replace(told, background=1 - view.background)),
        "no shading": dataclasses.replace(base, view=dataclasses.replace(told, shading_known=none)),
    }


@torch.no_grad()
def probe(
    network: PriorNetwork, sampler: CatalogueSampler, abar_table: Tensor, n: int = 2048
) -> dict[str, dict[str, float]]:
    """Mean v-prediction loss of each variant at `PROBE_TIMES`, all on the same views and the same noise.

    Only samples whose caption names a colour count for "wrong colour": its right figure stands beside it as "right
    colour".
    """
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    batch = sampler.held_out_batch(n)
    noise = torch.randn_like(batch.images)
    torch.random.set_rng_state(state)
    named = batch.parts.word > 0
    named &= batch.parts.word <= 11
    rows: dict[str, dict[str, float]] = {}
    for name, parts in variants(batch.parts, sampler).items():
        losses = _losses(network, batch, parts, noise, abar_table, sampler)
        if name == "all right":
            rows["right colour"] = _mean(losses, named)
        rows[name] = _mean(losses, named if name == "wrong colour" else torch.ones_like(named))
    return rows


def _mean(losses: dict[float, Tensor], keep: Tensor) -> dict[str, float]:
    return {f"t={t}": round(value[keep].mean().item(), 5) for t, value in losses.items()}


def _losses(
    network: PriorNetwork, batch: Batch, parts: Parts, noise: Tensor, abar_table: Tensor, sampler: CatalogueSampler
) -> dict[float, Tensor]:
    tokens, condition = sampler.condition(parts)
    out = {}
    for t in PROBE_TIMES:
        timestep = torch.full((len(noise),), int(t * TRAIN_TIMESTEPS), device=noise.device)
        abar = abar_table[timestep].view(-1, 1, 1, 1)
        noisy = abar.sqrt() * batch.images + (1 - abar).sqrt() * noise
        target = abar.sqrt() * noise - (1 - abar).sqrt() * batch.images
        errors = []
        for part in torch.arange(len(noise), device=noise.device).split(512):
            with torch.autocast(noise.device.type, torch.bfloat16):
                v = network(noisy[part], timestep[part], tokens[part], condition[part])
            errors.append((v.float() - target[part]).square().flatten(1).mean(1))
        out[t] = torch.cat(errors)
    return out


@torch.no_grad()
def sample_sheet(
    network: PriorNetwork, encoder: TextEncoder, device: torch.device, scale: float = 3.0, steps: int = 40
) -> Image.Image:
    """One row per prompt of `SHEET_PROMPTS`: two samples without a camera, then one per azimuth of `SHEET_AZIMUTHS`; on
    white."""
    columns = 2 + len(SHEET_AZIMUTHS)
    captions = [p for p in SHEET_PROMPTS for _ in range(columns)]
    n = len(captions)
    tokens, pooled = encoder(["", *captions])
    known = torch.tensor([False, False, *[True] * len(SHEET_AZIMUTHS)], device=device).repeat(len(SHEET_PROMPTS))
    azimuth = torch.tensor([0, 0, *SHEET_AZIMUTHS], device=device).deg2rad().repeat(len(SHEET_PROMPTS))
    view = ViewCondition(
        azimuth, torch.full_like(azimuth, math.radians(20)), torch.ones(n, 3, device=device),
        torch.zeros(n, dtype=torch.long, device=device), known,
    )  # fmt: skip
    blind = dataclasses.replace(view, camera_known=torch.zeros_like(known))
    condition = torch.cat(
        [
            torch.cat([pooled[:1].expand(n, -1), blind.vector(n, device)], -1),
            torch.cat([pooled[1:], view.vector(n, device)], -1),
        ]
    )
    states = torch.cat([tokens[:1].expand(n, -1, -1), tokens[1:]])
    scheduler = noise_schedule()
    scheduler.set_timesteps(steps, device=device)
    x = torch.randn(n, 3, 64, 64, device=device)
    for t in scheduler.timesteps:
        with torch.autocast(device.type, torch.bfloat16):
            null, text = network(torch.cat([x, x]), t.expand(2 * n), states, condition).float().chunk(2)
        x = scheduler.step(null + scale * (text - null), t, x).prev_sample
    tiles = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    sheet = (
        tiles.reshape(len(SHEET_PROMPTS), columns, 64, 64, 3)
        .swapaxes(1, 2)
        .reshape(len(SHEET_PROMPTS) * 64, columns * 64, 3)
    )
    return Image.fromarray(np.ascontiguousarray(sheet))
