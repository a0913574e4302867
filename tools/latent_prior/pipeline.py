"""A pipeline folder in diffusers' format: written from trained networks, and read again to look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .networks import make_scheduler
from .store import read_source
from .text import CLASSES, FolderTextEncoder


def write_index(folder: Path) -> None:
    """`model_index.json` of a Stable Diffusion pipeline without a safety checker."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    } | {part: ["transformers", name] for part, name in CLASSES.items()}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def pack(
    source: Path, text_encoder: Path, folder: Path, dtype: torch.dtype = torch.float16, text_dtype: Any = None
) -> dict[str, int]:
    """Write the folder of what a training left, or of what was stored of it.

    Args:
        source: see `read_source`.
        text_encoder: folder of the package's text encoder, of which `text_encoder` and `tokenizer` are made.
        folder: to be written; must not hold a pipeline yet.
        dtype: of the stored weights.
        text_dtype: of the stored text encoder; default: `dtype`.

    Returns:
        Bytes of each component.

    Raises:
        ValueError: a source that `read_source` refuses, a folder that is not empty, or weights too large for `dtype`.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"folder: {folder} is not empty")
    trained = read_source(source)
    trained.vae.register_to_config(scaling_factor=trained.factor)
    folder.mkdir(parents=True, exist_ok=True)
    for name, model in (("vae", trained.vae), ("unet", trained.unet)):
        model.to(dtype)
        if any(not parameter.isfinite().all() for parameter in model.parameters()):
            raise ValueError(f"dtype: {name} has weights that {dtype} cannot hold")
        model.save_pretrained(folder / name)
    make_scheduler().save_pretrained(folder / "scheduler")
    stored = dtype if text_dtype is None else text_dtype
    FolderTextEncoder.from_package(text_encoder, stored).save(folder, stored)
    write_index(folder)
    return {
        part.name: sum(path.stat().st_size for path in part.iterdir())
        for part in sorted(folder.iterdir())
        if part.is_dir()
    }


class Pipeline:
    """The networks of a folder, in float32 and frozen.

    Args:
        folder: a pipeline folder as `pack` writes it.
        device: to load it to.

    Raises:
        ValueError: no such folder.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

        if not (folder / "model_index.json").is_file():
            raise ValueError(f"folder: {folder} holds no pipeline (model_index.json)")

        def load(model_class: Any, name: str) -> Any:
            model = model_class.from_pretrained(folder / name, local_files_only=True)
            return model.float().to(device).eval().requires_grad_(False)

        self.vae, self.unet = load(AutoencoderKL, "vae"), load(UNet2DConditionModel, "unet")
        self.scheduler: Any = DDIMScheduler.from_pretrained(folder / "scheduler")
        self.encoder = FolderTextEncoder.from_folder(folder).to(device)
