"""The distillation methods on one sheet: twelve objects by each, under the embedded prior, with times.

The prompts are a tuning set: what is chosen by this sheet is not judged by it. All settings are those that `generate`
has, save the mode; "sds" is the default, which hands over to csd. Runs go through `dreamfusion-fast batch`, and are
taken up again where a call was cut. In the folder are then methods.png, four views of each object, a row per prompt and
a column per method, and the batch's own page.

With `--times`, no object is made; a step of each method is timed alone: the mean over 100 steps at 64^2 without a wait
between them, after 30 to warm up. A step has eight views on a GPU, two on a CPU.

    python benchmarks/bench_methods.py --out out/methods --gpus-per-run 0.25
    python benchmarks/bench_methods.py --times
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from bench_step import time_steps
from machine import RESULTS, describe, headline, write_result
from PIL import Image, ImageDraw

from dreamfusion_fast.guidance import GuidanceConfig
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.trainer import Trainer

PROMPTS = (
    "a red chair",
    "an armchair",
    "a blue sofa",
    "a potted cactus",
    "a grand piano",
    "a teddy bear",
    "a desk lamp",
    "a bench",
    "a coconut tree",
    "a swivel chair",
    "a scooter",
    "a teapot",
)
METHODS = ("sds", "csd", "sdi", "ism", "vsd")
_VIEWS, _CELL, _LINE = 4, 96, 14


def rows_of(methods: Sequence[str], prompts: Sequence[str]) -> list[dict[str, object]]:
    """The batch's file: no video, no texture, since only previews are looked at."""
    return [
        {
            "prompt": prompt,
            "name": name_of(method, prompt),
            "guidance.mode": method,
            "export": {"turntable_frames": 0, "preview_views": _VIEWS, "texture_size": 64},
        }
        for method in methods
        for prompt in prompts
    ]


def name_of(method: str, prompt: str) -> str:
    """The name of a run's folder."""
    return f"{method}-{prompt.replace(' ', '-')}"


def sheet(folder: Path, methods: Sequence[str], prompts: Sequence[str]) -> Image.Image:
    """All previews that are there; where one is missing the cell is empty."""
    width = _VIEWS * _CELL
    page = Image.new("RGB", (len(methods) * width, _LINE + len(prompts) * (_CELL + _LINE)), "white")
    draw = ImageDraw.Draw(page)
    for column, method in enumerate(methods):
        draw.text((column * width + 4, 1), method, fill="black")
        for row, prompt in enumerate(prompts):
            top = _LINE + row * (_CELL + _LINE)
            draw.text((column * width + 4, top + 1), prompt, fill="black")
            path = folder / name_of(method, prompt) / "preview.png"
            if path.is_file():
                with Image.open(path) as preview:
                    page.paste(preview.convert("RGB").resize((width, _CELL)), (column * width, top + _LINE))
    return page


def milliseconds(method: str, device: torch.device) -> float:
    """The time of a step by this method, nothing beside it."""
    config = Config(prompt=PROMPTS[0], guidance=GuidanceConfig(mode=method))  # type: ignore[arg-type]
    schedule = replace(config.schedule, render_size_start=64, render_size=64)
    return time_steps(Trainer(replace(config, schedule=schedule), device), warm_up=30, steps=100)[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the sheet, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="the first so many")
    parser.add_argument("--out", default="out/methods", help="folder of the runs and the sheet")
    parser.add_argument("--gpus-per-run", default="1")
    parser.add_argument("--times", action="store_true", help="time steps, and write them to benchmarks/results")
    args = parser.parse_args(arguments)
    if args.times:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        about, rows = describe(device), []
        print("device", headline(about))
        for method in args.methods:
            rows.append({"method": method, "ms": milliseconds(method, device)})
            print(f"{method:5}{rows[-1]['ms']:9.2f} ms", flush=True)
        print("written:", write_result(RESULTS, "methods", about, rows))
        return 0
    prompts, folder = PROMPTS[: args.prompts], Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(rows_of(args.methods, prompts), sort_keys=False))
    command = [sys.executable, "-m", "dreamfusion_fast.cli", "batch", str(file), "--out", str(folder)]
    code = subprocess.run([*command, "--gpus-per-run", args.gpus_per_run]).returncode
    sheet(folder, args.methods, prompts).save(folder / "methods.png")
    print("written:", folder / "methods.png")
    return code


if __name__ == "__main__":
    sys.exit(main())
