"""A catalogue of pictures made on the spot, for the tools that train on one."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from prior_data import captions, views

NOUNS = ("Armchair", "Teapot")


def write_catalogue(folder: Path, views_each: int, held_out: int = 0) -> Path:
    """A data folder as prior_data.build writes it: discs of their own size and colour, lit from the front.

    There is a model for each of NOUNS, and `held_out` more of the last one, which are held out of training. Views go
    around at an elevation of 0.3 radians, all models' together once.
    """
    nouns = (*NOUNS, *NOUNS[-1:] * held_out)
    y, x = np.mgrid[-1 : 1 : views.SIZE * 1j, -1 : 1 : views.SIZE * 1j]
    blobs: dict[str, bytes] = {"albedo": b"", "normal": b""}
    ends: dict[str, list[int]] = {"albedo": [], "normal": []}
    for number in range(len(nouns)):
        inside = x**2 + y**2 < 0.3 + 0.3 * (number > 0)
        albedo = np.zeros((views_each, views.SIZE, views.SIZE, 4), np.uint8)
        albedo[:, inside] = [220, 40 + 120 * (number > 0), 30, 255]
        normal = np.full((views_each, views.SIZE, views.SIZE, 3), 127, np.uint8)
        normal[..., 2] = 255
        for kind, pictures in (("albedo", albedo), ("normal", normal)):
            blobs[kind] += views.encode(views.to_sheet(pictures), 90)
            ends[kind].append(len(blobs[kind]))
    for kind, blob in blobs.items():
        (folder / f"{kind}.bin").write_bytes(blob)
    angle = np.linspace(0, 2 * math.pi, views_each * len(nouns), endpoint=False).astype(np.float32)
    np.savez(
        folder / "views.npz",
        counts=np.array([views_each] * len(nouns)),
        albedo_ends=np.array(ends["albedo"]),
        normal_ends=np.array(ends["normal"]),
        model=np.repeat(np.arange(len(nouns), dtype=np.int32), views_each),
        azimuth=angle,
        elevation=np.full_like(angle, 0.3),
        distance=np.full_like(angle, 3.0),
    )
    models = []
    for number, noun in enumerate(nouns):
        split, colour = ("train" if number < len(NOUNS) else "held_out"), ("orange" if number else "red")
        phrases = dict(list(captions.phrases_for("none#1", noun).items())[:2])
        models.append({"noun": noun, "phrases": phrases, "colours": [colour], "weight": 1.0, "split": split})
    (folder / "models.json").write_text(json.dumps(models))
    return folder
