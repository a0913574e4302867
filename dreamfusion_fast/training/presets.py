"""The settings that a run starts from, by what guides it.

`Config`'s own defaults were found for the embedded prior, which knows little and shows nothing finer than 1/32 of the
scene: a small field, a thousand steps. A published diffusion model knows far more, and the settings that DreamFusion
and its reimplementations use with one are gathered here. They could not be tried on published weights while this was
written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dreamfusion_fast.fields import HashGridFieldConfig
from dreamfusion_fast.rendering import RendererConfig
from dreamfusion_fast.training.config import (
    ExportConfig,
    OccupancyConfig,
    OptimConfig,
    ScheduleConfig,
    ShadingConfig,
)

# Sides below which a model in a folder is taken for one like the embedded prior, pixels.
_SMALL_LATENT, _SMALL_PIXEL = 256, 64


def is_small(name: str) -> bool:
    """Whether a `GuidanceConfig.name` is that of a model as small as the embedded prior.

    Of a folder its configuration decides, here and now; a hub id is taken for that of a published model. Nothing is
    downloaded, and what cannot be read counts as large: the guidance says what is wrong with it.
    """
    if name == "embedded":
        return True
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return False
    try:
        unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
        size = int(unet["sample_size"])
        vae = folder / "vae" / "config.json"
        if not vae.is_file():
            return size < _SMALL_PIXEL
        levels = len(json.loads(vae.read_text(encoding="utf-8"))["block_out_channels"])
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return size * 2 ** (levels - 1) < _SMALL_LATENT


def settings_for(name: str) -> dict[str, Any]:
    """Fields of `Config` that differ from its defaults where the model called `name` guides, the guidance's apart.

    Steps, batch, field, samples along a ray, occupancy grid's decay and warm-up and learning rates are threestudio's
    for Stable Diffusion and DeepFloyd IF, light and the absence of annealing DreamFusion's.
    """
    if is_small(name):
        return {}
    return {
        "steps": 10_000,
        "batch": 1,
        "field": HashGridFieldConfig(mlp_dtype="auto"),
        "renderer": RendererConfig(),
        "occupancy": OccupancyConfig(decay=0.95, warmup_steps=256),
        "optim": OptimConfig(lr_table=0.01, lr_mlp=0.01),
        "shading": ShadingConfig(albedo_steps=0.1, ambient=0.1, diffuse=0.9),
        "schedule": ScheduleConfig(t_max_end=0.98, render_size_start=64),
        "export": ExportConfig(resolution=256, texture_size=2048),
    }
