"""The settings that a run starts from, by what guides it.

`Config`'s own defaults were found for the embedded prior, which knows little and shows nothing finer than 1/32 of the
scene: a small field, a thousand steps. A published diffusion model knows far more, and the settings that DreamFusion
and its reimplementations use with one are gathered here. They could not be tried on published weights while this was
written.

Recipes that others have tried are files in `dreamfusion_fast/presets`, for `--preset`; docs/recipes.md compares them.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.fields import HashGridFieldConfig
from dreamfusion_fast.guidance.config import KNOWN_GUIDANCE, GuidanceConfig, is_prior
from dreamfusion_fast.guidance.models.pipeline_origins import open_source
from dreamfusion_fast.io import user_path
from dreamfusion_fast.rendering import RendererConfig
from dreamfusion_fast.training.amortised import SCRATCH
from dreamfusion_fast.training.sections import (
    ExportConfig,
    LossConfig,
    OccupancyConfig,
    OptimConfig,
    Ramp,
    ScheduleConfig,
    ShadingConfig,
)

# Sides below which a model in a folder is taken for one like the embedded prior, pixels.
_SMALL_LATENT, _SMALL_PIXEL = 256, 64


_FOLDER = Path(__file__).parents[1] / "presets"


def preset_names() -> list[str]:
    """The names that `preset_text` takes."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def preset_text(name: str) -> str:
    """The YAML text of a preset: the settings of a published recipe.

    Raises:
        UserError: there is none of this name.
    """
    known = preset_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"unknown preset {name!r}; known: {', '.join(known)}{hint}")
    return (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def is_small(name: str) -> bool:
    """Whether a `GuidanceConfig.name` is that of a model as small as the embedded prior.

    Of a folder its configuration decides, here and now; a hub id is taken for that of a published model. Nothing is
    downloaded, and what cannot be read counts as large: the guidance says what is wrong with it.
    """
    if name in KNOWN_GUIDANCE:
        return name == "embedded"
    try:
        if is_prior(name):
            return True
        if not user_path(name, "guidance").is_dir():
            return False
        source = open_source(GuidanceConfig(name=name))
        return source.image_size < (_SMALL_PIXEL if source.class_name("vae") is None else _SMALL_LATENT)
    except (UserError, OSError):
        return False


def settings_for(name: str) -> dict[str, Any]:
    """Fields of `Config` that differ from its defaults where the model called `name` guides, the guidance's apart.

    Steps, batch, samples along a ray, the occupancy grid's decay and warm-up and the learning rates are threestudio's
    for Stable Diffusion and DeepFloyd IF; the field is stable-dreamfusion's; light and timesteps without annealing are
    DreamFusion's. The tenth that is albedo only lies between DreamFusion's fifteenth and threestudio's fifth. The
    export is finer as the field is.
    """
    if is_small(name):
        return {}
    return {
        "init": SCRATCH,
        "steps": 10_000,
        "batch": 1,
        "field": HashGridFieldConfig(mlp_dtype="auto"),
        "renderer": RendererConfig(),
        "occupancy": OccupancyConfig(decay=0.95, warmup_steps=256),
        "optim": OptimConfig(lr_table=0.01, lr_mlp=0.01),
        "shading": ShadingConfig(albedo_steps=0.1, ambient=0.1, diffuse=0.9),
        "loss": LossConfig(sample_entropy=Ramp(), binary=Ramp()),
        "schedule": ScheduleConfig(t_max_end=0.98, sds_share=Ramp(1.0, 1.0), render_size_start=64),
        "export": ExportConfig(resolution=256, texture_size=2048),
    }
