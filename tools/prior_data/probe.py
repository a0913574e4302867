"""Does the prior hear what it is told?

The loss on unseen views with each condition right, wrong and absent; and a sheet of samples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dreamfusion_fast.guidance.models.embedded.model import TRAIN_TIMESTEPS, PriorNetwork, ViewCondition, noise_schedule
from dreamfusion_fast.guidance.models.embedded.text_encoder import TextEncoder
from dreamfusion_fast.guidance.prompts import view_index

from .batches import CatalogueSampler, Parts

PROBE_TIMES = (0.2, 0.4, 0.6, 0.8, 0.95)
SHEET_PROMPTS = (
    "a chair", "a table", "a potted cactus", "an armchair", "a teapot", "a red car", "a sofa", "a grand piano",
    "a guitar", "a bed", "a bicycle", "a dog", "a blue couch", "an automobile", "a lamp", "a clay chair",
)  # fmt: skip
SHEET_AZIMUTHS = (0, 45, 90, 180, 225, 300)


def variants(parts: Parts, sampler: CatalogueSampler, group: int = 1) -> dict[str, Parts]:
    """The same pictures told rightly, wrongly and not at all, by name of the variant; all of a group alike."""
    n, device = len(parts.phrase), sampler.device
    view = parts.view
    every, none = torch.ones(n, dtype=torch.bool, device=device), torch.zeros(n, dtype=torch.bool, device=device)
    right_suffix = 1 + view_index(view.azimuth, view.elevation)
    wrong_suffix = torch.where(right_suffix == 1, 3, torch.where(right_suffix == 3, 1, 1 + right_suffix % 4))
    shuffled = torch.roll(parts.phrase, group)
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
    network: PriorNetwork, sampler: CatalogueSampler, abar_table: Tensor, n: int = 2048, group: int = 1
) -> dict[str, dict[str, float]]:
    """Mean v-prediction loss of each variant at `PROBE_TIMES`, all on the same views and the same noise.

    Only samples whose caption names a colour count for "wrong colour": its right figure stands beside it as "right
    colour". Of groups only the first view of each is measured, which was never trained on. All views of a group are
    told the same variant, and there are rows for what one view learns of the others. "front told from back" is no loss,
    but the share of views from the front or from behind whose loss is lower with their camera than with the opposite.

    Args:
        n: views, those of whole groups.
        group: 1, or the views that the network reads together.
    """
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    batch = sampler.held_out_batch(n // group * group, group)
    noise = torch.randn_like(batch.images)
    torch.random.set_rng_state(state)
    measured = slice(None, None, group)

    def losses(parts: Parts, images: Tensor = batch.images) -> dict[float, Tensor]:
        tokens, condition = sampler.condition(parts)
        found = _losses(network, images, noise, tokens, condition, abar_table, group)
        return {t: value[measured] for t, value in found.items()}

    word = batch.parts.word[measured]
    named = (word > 0) & (word <= 11)
    every = torch.ones_like(named)
    rows: dict[str, dict[str, float]] = {}
    told = variants(batch.parts, sampler, group)
    found = {name: losses(parts) for name, parts in told.items()}
    for name, values in found.items():
        if name == "all right":
            rows["right colour"] = _mean(values, named)
        rows[name] = _mean(values, named if name == "wrong colour" else every)
    right, opposite = told["all right"], found["opposite camera"]
    assert right.view.azimuth is not None
    if group > 1:
        first = torch.arange(len(noise), device=noise.device) % group == 0
        turned = torch.where(first, right.view.azimuth + math.pi, right.view.azimuth)
        opposite = losses(dataclasses.replace(right, view=dataclasses.replace(right.view, azimuth=turned)))
        rows["own camera opposite"] = _mean(opposite, every)
        index = torch.arange(len(noise), device=noise.device)
        index = torch.where(first, index, index.roll(group))
        rows["other views of another object"] = _mean(losses(_taken(right, index), batch.images[index]), every)
        tokens, condition = (values[measured] for values in sampler.condition(right))
        alone = _losses(network, batch.images[measured], noise[measured], tokens, condition, abar_table, 1)
        rows["no other views"] = _mean(alone, every)
    azimuth = right.view.azimuth[measured]
    ends = azimuth.cos().abs() > azimuth.sin().abs()
    better = {t: (value < opposite[t]).float() for t, value in found["all right"].items()}
    rows["front told from back"] = _mean(better, ends)
    return rows


def _taken(parts: Parts, index: Tensor) -> Parts:
    """The parts of other samples, `[n]` int64."""
    view = {name: None if value is None else value[index] for name, value in vars(parts.view).items()}
    own = {name: getattr(parts, name)[index] for name in ("phrase", "word", "suffix", "null")}
    return Parts(**own, view=ViewCondition(**view))


def _mean(values: dict[float, Tensor], keep: Tensor) -> dict[str, float]:
    return {f"t={t}": round(value[keep].mean().item(), 5) for t, value in values.items()}


def _losses(
    network: PriorNetwork,
    images: Tensor,
    noise: Tensor,
    tokens: Tensor,
    condition: Tensor,
    abar_table: Tensor,
    group: int,
) -> dict[float, Tensor]:
    """The loss of each image `[n]` at each of `PROBE_TIMES`."""
    out = {}
    for t in PROBE_TIMES:
        timestep = torch.full((len(noise),), int(t * TRAIN_TIMESTEPS), device=noise.device)
        abar = abar_table[timestep].view(-1, 1, 1, 1)
        noisy = abar.sqrt() * images + (1 - abar).sqrt() * noise
        target = abar.sqrt() * noise - (1 - abar).sqrt() * images
        errors = []
        for part in torch.arange(len(noise), device=noise.device).split(512 // group * group):
            with autocast(noise.device):
                v = network(noisy[part], timestep[part], tokens[part], condition[part], group)
            errors.append((v.float() - target[part]).square().flatten(1).mean(1))
        out[t] = torch.cat(errors)
    return out


def autocast(device: torch.device) -> torch.autocast:
    """Arithmetic of the training: bfloat16 on a GPU, float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def sample_sheet(
    network: PriorNetwork,
    encoder: TextEncoder,
    device: torch.device,
    scale: float = 3.0,
    steps: int = 40,
    group: int = 1,
    prompts: Sequence[str] = SHEET_PROMPTS,
) -> Image.Image:
    """One row per prompt, on white: two samples without a camera, then one per azimuth of `SHEET_AZIMUTHS`.

    Of groups: two in a row, each with its views evenly around the object, the front first.
    """
    if group == 1:
        azimuths, told = [0, 0, *SHEET_AZIMUTHS], [False, False, *[True] * len(SHEET_AZIMUTHS)]
    else:
        azimuths, told = [round(360 * view / group) for view in range(group)] * 2, [True] * (2 * group)
    columns = len(azimuths)
    captions = [p for p in prompts for _ in range(columns)]
    n = len(captions)
    tokens, pooled = encoder(["", *captions])
    known = torch.tensor(told, device=device).repeat(len(prompts))
    azimuth = torch.tensor(azimuths, device=device).deg2rad().repeat(len(prompts))
    view = ViewCondition(
        azimuth, torch.full_like(azimuth, math.radians(20)), torch.ones(n, 3, device=device),
        torch.zeros(n, dtype=torch.long, device=device), known,
    )  # fmt: skip
    # A run tells the camera under both conditions; single samples here go without one where there is no caption.
    blind = view if group > 1 else dataclasses.replace(view, camera_known=torch.zeros_like(known))
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
        with autocast(device):
            both = network(torch.cat([x, x]), t.expand(2 * n), states, condition, group)
        null, text = both.float().chunk(2)
        x = scheduler.step(null + scale * (text - null), t, x).prev_sample
    tiles = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    sheet = tiles.reshape(len(prompts), columns, 64, 64, 3).swapaxes(1, 2).reshape(len(prompts) * 64, columns * 64, 3)
    return Image.fromarray(np.ascontiguousarray(sheet))
