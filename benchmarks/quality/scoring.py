"""The scores of one object: by the judges, in colour and textureless, its faces, and how flat it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamfusion_fast.export import save_png
from dreamfusion_fast.io import write_text
from quality import pictures
from quality.faces import FrontFinder
from quality.judges import Judge, guess, verdict
from quality.pictures import MODES, Layers, lit
from quality.prompts import Prompt, others
from quality.shape import relief, thickness

FILE, LAYERS, STRIP = "quality.json", "quality-views.npz", "quality.png"
"""In a run's folder: its scores, what they were made from, and the same as a picture (colour above textureless)."""
_STRIP_SIZE = 112


def seen_from_around(mesh: Path, size: int = pictures.SIZE) -> Path:
    """Draw a run's mesh.glb once, beside it; drawn again where the mesh is newer or the size another."""
    path = mesh.with_name(LAYERS)
    if path.is_file() and path.stat().st_mtime >= mesh.stat().st_mtime:
        with np.load(path) as archive:
            if archive["alpha"].shape[1] == size:
                return path
    layers = pictures.of_file(mesh, pictures.VIEWS, size)
    small = pictures.of_file(mesh, pictures.FACE_VIEWS, pictures.FACE_SIZE)
    values = {
        prefix + name: np.round(value * 127.5 + 127.5 if name == "normal" else value * 255).astype(np.uint8)
        for prefix, each in (("", layers), ("small_", small))
        for name, value in vars(each).items()
    }
    partial = path.with_suffix(".tmp.npz")
    np.savez_compressed(partial, **values)
    partial.replace(path)
    return path


def read_layers(path: Path) -> tuple[Layers, Layers]:
    """The pictures that `seen_from_around` wrote: eight large views, and 24 small ones."""
    with np.load(path) as archive:
        values = {name: archive[name].astype(np.float32) for name in archive.files}
    normals = {}
    for prefix in ("", "small_"):
        normal = values[prefix + "normal"] / 127.5 - 1
        length = np.linalg.norm(normal, axis=-1, keepdims=True)
        normals[prefix] = np.where(length > 0.5, normal / np.maximum(length, 0.5), 0).astype(np.float32)
    large, small = (
        Layers(values[prefix + "albedo"] / 255, normals[prefix], values[prefix + "alpha"] / 255)
        for prefix in ("", "small_")
    )
    return large, small


def judged(
    judges: Sequence[Judge], picture: Callable[[str], NDArray[np.float32]], prompt: Prompt, prompts: tuple[Prompt, ...]
) -> dict[str, dict[str, Any]]:
    """Scores by judge and mode, as "lite0 colour".

    Args:
        judges: who is asked.
        picture: of a mode, the views [n, size, size, 3].
        prompt: what the views should show.
        prompts: all; `permuted` is the share of those without a common class that the views would pass for.
    """
    scores = {}
    wrong = others(prompts, prompt)
    for mode in MODES:
        images = picture(mode)
        for judge in judges:
            probabilities = judge.probabilities(images)
            permuted = [verdict(probabilities, other.classes)["top5"] for other in wrong]
            scores[f"{judge.name} {mode}"] = {
                **verdict(probabilities, prompt.classes),
                "permuted": float(np.mean(permuted)) if permuted else 0.0,
                "guess": guess(probabilities),
            }
    return scores


def score(
    judges: Sequence[Judge],
    finder: FrontFinder,
    large: Layers,
    small: Layers,
    prompt: Prompt,
    prompts: tuple[Prompt, ...],
) -> dict[str, Any]:
    """All of one object: `judges`, `shape`, and `faces` for one that should have a front."""
    return {
        "judges": judged(judges, lambda mode: lit(large, mode), prompt, prompts),
        "shape": {"thickness": thickness(large), "relief": relief(large)},
        "faces": finder.score(small) if prompt.has_front else None,
    }


def score_run(
    folder: Path, judges: Sequence[Judge], finder: FrontFinder, prompt: Prompt, prompts: tuple[Prompt, ...]
) -> dict[str, Any]:
    """Score a run once; again where its mesh was drawn anew, or other judges or prompts are asked for."""
    path, views = folder / FILE, folder / LAYERS
    names, texts = [judge.name for judge in judges], [each.text for each in prompts]
    asked = {"judges": names, "prompts": texts, "threshold": finder.threshold}
    if path.is_file() and path.stat().st_mtime >= views.stat().st_mtime:
        known = json.loads(path.read_text(encoding="utf-8"))
        if known.pop("asked") == asked:
            return known
    large, small = read_layers(views)
    scores = score(judges, finder, large, small, prompt, prompts)
    rows = [np.concatenate(list(_smaller(lit(large, mode))), 1) for mode in MODES]
    save_png(folder / STRIP, np.round(np.concatenate(rows) * 255).astype(np.uint8))
    write_text(path, json.dumps({"asked": asked, **scores}, indent=1) + "\n")
    return scores


def _smaller(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """By a whole factor to `_STRIP_SIZE` or a little more; smaller ones stay."""
    factor = max(1, images.shape[1] // _STRIP_SIZE)
    size = images.shape[1] // factor
    cut = images[:, : size * factor, : size * factor]
    return cut.reshape(len(images), size, factor, size, factor, 3).mean((2, 4))
