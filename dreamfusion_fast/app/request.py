"""Requests from the page, checked, as the settings of a run and as pictures of the prompt."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreamfusion_fast.app.jobs import COMMAND
from dreamfusion_fast.errors import UserError, one_line
from dreamfusion_fast.guidance.config import KNOWN_GUIDANCE
from dreamfusion_fast.settings import SettingError, shown
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.presets import preset_names

LONGEST_PROMPT = 500  # letters; text encoders hear fewer
PICTURES, _PICTURE_STEPS, _PICTURE_SECONDS = 4, 20, 600
# In the course of a run, so that it can be watched, and steps between two at least. On a CPU one takes about as long as
# a step of two views of 64^2.
_PREVIEWS, _BETWEEN = 40, 10


def guidance_names(own: Sequence[str] = ()) -> list[str]:
    """The models to choose from: those that have a name, and those that whoever started the server has named."""
    return [*KNOWN_GUIDANCE, *(name for name in own if name not in KNOWN_GUIDANCE)]


def config_of(
    prompt: Any,
    preset: Any = None,
    guidance: Any = None,
    scale: Any = None,
    seed: Any = 0,
    steps: Any = None,
    *,
    own: Sequence[str] = (),
    device: str = "auto",
) -> Config:
    """The settings of a run.

    Args:
        prompt: what to make.
        preset: a name of `preset_names`, or None.
        guidance: one of `guidance_names`; None: the preset's, or the embedded prior.
        scale: of guidance; None or empty: the method's.
        seed: of everything random; None: 0.
        steps: None or empty: as many as the preset has, or the guidance wants.
        own: as for `guidance_names`.
        device: auto, cpu, cuda or cuda:1.

    Raises:
        UserError: something of it cannot be.
    """
    prompt = _prompt(prompt)
    if preset is not None and preset not in preset_names():
        raise UserError(f"preset: got {shown(preset)}, want one of {', '.join(preset_names())}")
    if guidance is not None and guidance not in guidance_names(own):
        raise UserError(f"guidance: got {shown(guidance)}, want one of {', '.join(guidance_names(own))}")
    try:
        config = Config.for_guidance(guidance or "embedded") if preset is None else Config.from_preset(preset)
        named = {} if guidance is None else {"name": guidance}
        scale = _number("guidance scale", scale)
        scaled = {} if scale is None else {"guidance_scale": scale}
        config = dataclasses.replace(
            config,
            prompt=prompt,
            seed=_whole("seed", seed, 0),
            device=device,
            guidance=dataclasses.replace(config.guidance, **named, **scaled),
            steps=_whole("steps", steps, config.steps),
        )
        every = max(_BETWEEN, config.steps // _PREVIEWS)
        return dataclasses.replace(
            config, log=dataclasses.replace(config.log, preview_every=min(every, config.log.preview_every or every))
        )
    except SettingError as error:
        raise UserError(f"{error.name.replace('_', ' ')}: {error.problem}") from error


def pictures_of(prompt: Any, seed: Any, path: Path, device: str = "auto", command: Sequence[str] = COMMAND) -> None:
    """Let the embedded prior draw a prompt, in a process of its own, which gives back its memory.

    Args:
        prompt: what to draw.
        seed: of the noise.
        path: PNG file to write; one that exists is replaced.
        device: as for `config_of`.
        command: that the command line's arguments come behind.

    Raises:
        UserError: the prompt or the seed cannot be, or the prior could not draw.
    """
    options = [f"--out={path}", "--overwrite", f"-n={PICTURES}", f"--steps={_PICTURE_STEPS}", f"--device={device}"]
    words = [*command, "sample", *options, f"--seed={_whole('seed', seed, 0)}", "--", _prompt(prompt)]
    with tempfile.TemporaryFile() as said:
        try:
            done = subprocess.run(
                words, stdin=subprocess.DEVNULL, stdout=said, stderr=said, timeout=_PICTURE_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"no pictures within {_PICTURE_SECONDS} s; is the machine busy?") from None
        if done.returncode != 0:
            said.seek(0)
            lines = said.read().decode("utf-8", "replace").strip().splitlines() or ["it said nothing"]
            raise UserError(f"no pictures: {one_line(lines[-1].removeprefix('error: '))}")


def _prompt(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError('the prompt is empty; say what to make, such as "an armchair"')
    prompt = " ".join(value.split())
    if len(prompt) > LONGEST_PROMPT:
        raise UserError(f"prompt: got {len(prompt)} letters, want at most {LONGEST_PROMPT}")
    if not prompt.isprintable():
        raise UserError(f"prompt: got {shown(prompt)}, want text that can be printed")
    return prompt


def _number(name: str, value: Any) -> float | None:
    """A number of the page, or text of one; None where nothing is given."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{name}: got {shown(value)}, want a number")
    return number


def _whole(name: str, value: Any, default: int) -> int:
    """As `_number`, of a whole one, which may come as 3.0."""
    number = _number(name, value)
    if number is None:
        return default
    if number % 1:
        raise UserError(f"{name}: got {shown(value)}, want a whole number")
    return int(value) if isinstance(value, int) else int(number)
