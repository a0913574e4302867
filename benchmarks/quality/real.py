"""The catalogue's models as the measure sees objects: the ceiling beside each score, and what views are learned from.

Needs what `tools/README.md` lists for the data of the embedded prior: Debian's sweethome3d-furniture, moderngl, EGL.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quality import pictures
from quality.pictures import Layers

Models = Sequence[tuple[Any, str]]
"""Entries of the catalogue (`prior_data.catalogue.Entry`) with their nouns."""

_renderers: dict[int, Any] = {}


def catalogue(package: Path, work: Path) -> list[tuple[Any, str]]:
    """All models that the prior knows, with their nouns.

    Args:
        package: sweethome3d-furniture_*.deb.
        work: folder where it is unpacked, once.
    """
    from prior_data.captions import describe, is_dropped
    from prior_data.catalogue import read_catalogue, unpack

    return [
        (entry, describe(entry)["noun"]) for entry in read_catalogue(unpack(package, work)) if not is_dropped(entry)
    ]


def of_model(entry: Any, views: int, size: int) -> Layers:
    """Views of a model of the catalogue."""
    from prior_data.render import MINIMUM_DISTANCE, Renderer, Scene

    if size not in _renderers:
        _renderers[size] = Renderer(size)
    scene = Scene(_renderers[size], entry)
    elevation = np.deg2rad(pictures.ELEVATION_DEG)
    seen = [scene.view(2 * np.pi * view / views, elevation, MINIMUM_DISTANCE) for view in range(views)]
    scene.release()
    colour, normal = (np.stack([view[layer] for view in seen]).astype(np.float32) for layer in (0, 1))
    return Layers(colour[..., :3], normal, colour[..., 3])


def _packed(entry: Any) -> NDArray[np.uint8]:
    layers = of_model(entry, pictures.FACE_VIEWS, pictures.FACE_SIZE)
    values = np.concatenate([layers.albedo, layers.normal / 2 + 0.5, layers.alpha[..., None]], -1)
    return np.round(values * 255).astype(np.uint8)


def unpacked(values: NDArray[np.uint8]) -> Layers:
    """Undo the packing of a model in `small_views`."""
    normal = values[..., 3:6].astype(np.float32) / 127.5 - 1
    length = np.linalg.norm(normal, axis=-1, keepdims=True)
    normal = np.where(length > 0.5, normal / np.maximum(length, 0.5), 0)
    return Layers(values[..., :3] / np.float32(255), normal.astype(np.float32), values[..., 6] / np.float32(255))


def small_views(models: Models, folder: Path) -> tuple[NDArray[np.uint8], list[str]]:
    """Views of all models at 64 pixels, made once and kept in `folder`.

    Returns:
        uint8 [models, 24, 64, 64, 7] (albedo, (normal + 1) / 2, coverage), and the models' nouns.
    """
    values, names = folder / "views.npy", folder / "nouns.json"
    if not names.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        size = pictures.FACE_SIZE
        shape = (len(models), pictures.FACE_VIEWS, size, size, 7)
        kept = np.lib.format.open_memmap(values, "w+", np.uint8, shape)
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            for number, packed in enumerate(pool.map(_packed, [entry for entry, _ in models], chunksize=4)):
                kept[number] = packed
                if number % 50 == 0:
                    print(f"{number}/{len(models)} models", flush=True)
        kept.flush()
        names.write_text(json.dumps([noun for _, noun in models]) + "\n", encoding="utf-8")
    return np.load(values, mmap_mode="r"), json.loads(names.read_text(encoding="utf-8"))
