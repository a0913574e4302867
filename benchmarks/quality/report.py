"""From the scores of the runs to a result: numbers with intervals, controls and ceiling beside them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from quality import intervals
from quality.judges import Judge, verdict
from quality.pictures import MODES, controls
from quality.prompts import Prompt
from quality.scoring import STRIP

Scores = Mapping[str, Sequence[Mapping[str, Any]]]
"""By prompt, one entry per run that came out."""
_JUDGED = ("top5", "top1", "views", "probability", "permuted")
_SHARES = {"top5", "top1"}


def summary(scores: Scores, prompts: Sequence[Prompt]) -> dict[str, dict[str, float]]:
    """Mean and interval of each measure over the prompts, as "lite0 colour top5", "many_faces", "thickness"."""
    result = {}
    runs = {prompt.text: scores[prompt.text] for prompt in prompts if scores.get(prompt.text)}
    kinds = next(iter(runs.values()))[0]["judges"] if runs else {}
    for kind in kinds:
        for name in _JUDGED:
            values = [float(np.mean([run["judges"][kind][name] for run in each])) for each in runs.values()]
            result[f"{kind} {name}"] = (intervals.share if name in _SHARES else intervals.mean)(values)
    for part, names in (("faces", ("many_faces", "front")), ("shape", ("thickness", "relief"))):
        for name in names:
            # Objects without a front have no faces to count.
            values = [
                float(np.mean([run[part][name] for run in each])) for each in runs.values() if each[0][part] is not None
            ]
            if values:
                result[name] = intervals.mean(values)
    return result


def control_scores(
    judges: Sequence[Judge], prompts: Sequence[Prompt], more: Mapping[str, NDArray[np.float32]]
) -> dict[str, dict[str, float]]:
    """For pictures that show nothing, the share of the prompts that they pass for, by control and then by judge.

    Args:
        judges: who is asked.
        prompts: all.
        more: other pictures than those of `controls`, by name: the untrained field.
    """
    result: dict[str, dict[str, float]] = {}
    for name, images in {**controls(), **more}.items():
        said = {judge.name: judge.probabilities(images) for judge in judges}
        result[name] = {
            judge: float(np.mean([verdict(values, prompt.classes)["top5"] for prompt in prompts]))
            for judge, values in said.items()
        }
    return result


def table(result: Mapping[str, Any]) -> str:
    """Markdown of a result: each measure, its interval, the same of real models, and the controls."""
    objects, real = result["objects"], result["real"]
    lines = ["| measure | objects | 95 % | real models | permuted prompts |", "|---|---|---|---|---|"]
    for name, value in objects.items():
        if name.endswith(" permuted"):
            continue
        permuted = objects.get(name.removesuffix("top5") + "permuted") if name.endswith("top5") else None
        cells = [_cell(real[name]) if name in real else "-", _cell(permuted) if permuted else "-"]
        lines.append(f"| {name} | {_cell(value)} | {value['low']:.3f} to {value['high']:.3f} | {' | '.join(cells)} |")
    names = list(next(iter(result["controls"].values())))
    lines += [
        "",
        "| control, share of the prompts passed | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for control, shares in result["controls"].items():
        lines.append(f"| {control} | " + " | ".join(f"{shares[name]:.3f}" for name in names) + " |")
    trust = result["view_classifier"]
    lines += [
        "",
        f"View classifier, on {trust['models_tested']:.0f} held-out models: accuracy {trust['accuracy']:.3f} of three "
        f"classes; {trust['fronts_found']:.3f} of the front views found, {trust['false_fronts']:.3f} of the others "
        f"taken for one, and {trust['false_fronts_of_two_faced']:.3f} where the back is a second front.",
    ]
    return "\n".join(lines) + "\n"


def _cell(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.3f}"


def by_prompt(scores: Scores, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """A row per prompt: runs that came out, top 5 by judge and mode, faces and shape, means over its seeds."""
    rows: list[dict[str, Any]] = []
    for prompt in prompts:
        runs = scores.get(prompt.text) or []
        row: dict[str, Any] = {"prompt": prompt.text, "runs": len(runs)}
        if runs:
            row |= {kind: float(np.mean([run["judges"][kind]["top5"] for run in runs])) for kind in runs[0]["judges"]}
            for part in ("faces", "shape"):
                for name in runs[0][part] or ():
                    row[name] = float(np.mean([run[part][name] for run in runs]))
        rows.append(row)
    return rows


def sheet(folders: Mapping[str, Sequence[Path]], size: int = 64) -> Image.Image:
    """All objects, a row per prompt, a column per seed: four views in colour, and two of the bare shape."""
    columns, line = max(len(each) for each in folders.values()), 13
    width, height = 6 * size + 8, size + line
    page = Image.new("RGB", (columns * width, len(folders) * height), "white")
    draw = ImageDraw.Draw(page)
    for row, (text, each) in enumerate(folders.items()):
        draw.text((3, row * height + 1), text, fill=(60, 60, 60))
        for column, folder in enumerate(each):
            if not (folder / STRIP).is_file():
                continue
            with Image.open(folder / STRIP) as opened:
                strip = opened.convert("RGB")
            side = strip.height // len(MODES)
            for place, (mode, view) in enumerate([(0, 0), (0, 2), (0, 4), (0, 6), (1, 0), (1, 1)]):
                box = (view * side, mode * side, (view + 1) * side, (mode + 1) * side)
                cell = strip.crop(box).resize((size, size), Image.Resampling.LANCZOS)
                page.paste(cell, (column * width + place * size, row * height + line))
    return page


HISTORY = (
    "date", "commit", "device", "label", "runs", "lite0 colour top5", "lite2 colour top5", "lite0 textureless top5",
    "lite2 textureless top5", "lite0 colour permuted", "many_faces", "front", "thickness", "relief",
)  # fmt: skip


def remember(path: Path, result: Mapping[str, Any]) -> None:
    """Append a result to the history, a CSV with the names of `HISTORY` at its top."""
    new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(HISTORY)
        objects = result["objects"]
        writer.writerow(f"{objects[name]['mean']:.4f}" if name in objects else result.get(name, "") for name in HISTORY)
