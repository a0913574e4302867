"""The command `batch`: its options, and the settings that rows start from."""

from __future__ import annotations

import argparse
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from dreamfusion_fast.batch.config import BatchConfig
from dreamfusion_fast.batch.jobs import ProblemsError, read_jobs
from dreamfusion_fast.errors import UserError
from dreamfusion_fast.settings import SettingError
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.device import resolve_device

_log = logging.getLogger(__name__)

_DESCRIPTION = """\
Make a textured mesh of each prompt in FILE: text with one per line, or YAML or CSV with settings for each row.

FILE comes first. --out FOLDER takes all runs (by default runs). --ray ADDRESS uses a Ray cluster that is there.
--gpus-per-run SHARE (0.25: four runs on each GPU), --cpus-per-run N and --workers N say how many run at a time.
--config FILE.yaml, --preset NAME, --field KIND and --init FILE are as in generate, as are the options below: rows
start from them, and win."""


def command(arguments: Sequence[str], parser: argparse.ArgumentParser, parse: Callable[..., Any]) -> int:
    """Run a batch by its command line.

    Args:
        arguments: behind the word batch.
        parser: without arguments yet.
        parse: of the options of a dataclass, as `cli` does it.

    Returns:
        The exit code: 0: all came out; 1: not all.

    Raises:
        UserError: an option or something in the file is wrong; nothing has been started.
    """
    for option in ("--out", "--ray", "--config", "--preset"):
        parser.add_argument(option)
    parser.add_argument("--gpus-per-run", type=float)
    parser.add_argument("--cpus-per-run", type=int)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--guidance.name", dest="guidance")
    parser.add_argument("--field")
    asks_for_help = bool({"-h", "--help"} & set(arguments))
    if not asks_for_help and (not arguments or arguments[0].startswith("-")):
        raise UserError("give the file of prompts first: dreamfusion-fast batch prompts.txt --out runs")
    given, rest = parser.parse_known_args(list(arguments[not asks_for_help :]))

    @functools.cache
    def base(preset: str | None, guidance: str | None) -> Config:
        preset, guidance = preset or given.preset, guidance or given.guidance
        start = None if preset is None else Config.from_preset(preset)
        config = start or Config.for_guidance(guidance or "embedded")
        if given.config is not None:
            config = Config.load(given.config, guidance=guidance, base=start)
        if given.field is not None:
            config = config.with_field(given.field)
        named = rest if guidance is None else [*rest, "--guidance.name", guidance]
        return parse(Config, named, "batch", _DESCRIPTION, config)

    common = base(None, None)
    if common.prompt:
        raise UserError(f"{common.prompt} is one too many; prompts are in the file")
    if common.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device: got {common.device}, want auto, cpu or cuda: each worker has a GPU of its own")
    if not given.ray:
        resolve_device(common.device)
    names = ("out", "ray", "gpus_per_run", "cpus_per_run", "workers")
    try:
        config = BatchConfig(**{name: getattr(given, name) for name in names if getattr(given, name) is not None})
    except SettingError as error:
        raise UserError(f"--{error.name.replace('_', '-')}: {error.problem}") from error
    try:
        jobs = read_jobs(arguments[0], config.out, base)
    except ProblemsError as error:
        for problem in error.problems[1:]:
            _log.error("%s", problem)
        raise
    from dreamfusion_fast.batch.run import run_batch

    outcomes = run_batch(jobs, config, common.device)
    failed = [name for name, outcome in outcomes.items() if outcome.error is not None]
    came = f"{len(jobs) - len(failed)} of {len(jobs)} came out"
    print(f"{came}; done: {config.out}/index.html" if not failed else f"{came}; see {config.out}/index.html")
    return 1 if failed else 0
