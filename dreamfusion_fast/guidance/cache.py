"""Prompt embeddings on disk, so that a text encoder is loaded once per model and prompt."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance.prompts import Prompt
from dreamfusion_fast.io import atomic_path, read_safetensors, user_path

# Part of every key: raised whenever the meaning of a stored file changes.
_FORMAT = 1


def default_cache_dir() -> Path:
    """DREAMFUSION_FAST_CACHE if it is set, else the folder the platform keeps caches in; UserError if there is none."""
    chosen = os.environ.get("DREAMFUSION_FAST_CACHE")
    if chosen:
        return user_path(chosen, "DREAMFUSION_FAST_CACHE")
    try:
        return _platform_cache() / "dreamfusion_fast"
    except RuntimeError as error:  # neither HOME is set, nor has this user a home
        raise UserError("there is no home folder for a cache: set HOME or DREAMFUSION_FAST_CACHE") from error


def _platform_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


class EmbeddingCache:
    """Named tensors by the content they were computed from.

    Args:
        directory: where to keep them; `default_cache_dir` and its folder "embeddings" if None. A folder that cannot be
            written, or none at all, costs a warning and the time to embed again, not the run.
    """

    def __init__(self, directory: Path | str | None = None):
        self.directory: Path | None = None if directory is None else Path(directory)
        if directory is None:
            try:
                self.directory = default_cache_dir() / "embeddings"
            except UserError as error:
                warnings.warn(f"prompt embeddings are not kept: {error}", stacklevel=2)

    def get_or_compute(
        self,
        identity: str,
        texts: list[Prompt],
        compute: Callable[[list[Prompt]], dict[str, Tensor]],
        shapes: Mapping[str, tuple[int | None, ...]] | None = None,
    ) -> dict[str, Tensor]:
        """The stored embeddings of these texts by the model with this identity, on the CPU, or `compute(texts)`.

        Stored ones that are damaged, or of other names or shapes than `shapes` (as `DiffusionModel.text_shapes` gives
        them; empty or None for any), are made again.
        """
        if self.directory is None:
            return compute(texts)
        key = hashlib.sha256(json.dumps([_FORMAT, identity, texts]).encode()).hexdigest()
        path = self.directory / f"{key}.safetensors"
        stored = _read(path, len(texts), shapes or {})
        if stored is not None:
            return stored
        tensors = {name: value.detach().to("cpu").contiguous() for name, value in compute(texts).items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:  # also beside another process that does the same
                save_file(tensors, temporary, metadata={"sha256": _digest(tensors)})
        except OSError as error:
            warnings.warn(f"prompt embeddings are not kept: cannot write {path} ({error.strerror})", stacklevel=2)
        return tensors


def _digest(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}:".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, rows: int, shapes: Mapping[str, tuple[int | None, ...]]) -> dict[str, Tensor] | None:
    """The tensors `[rows, ..., width]` of a whole, undamaged file; None for no file and, with a warning, any other."""
    try:
        tensors, metadata = read_safetensors(path)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        warnings.warn(f"the cached prompt embeddings {path} cannot be read and are made again ({error})", stacklevel=3)
        return None
    shaped = all(value.ndim >= 2 and len(value) == rows and value.is_floating_point() for value in tensors.values())
    if not tensors or not shaped or metadata.get("sha256") != _digest(tensors):
        warnings.warn(f"the cached prompt embeddings {path} are damaged and are made again", stacklevel=3)
        return None
    if shapes and not _fit(tensors, shapes):
        warnings.warn(f"the cached prompt embeddings {path} are not this model's and are made again", stacklevel=3)
        return None
    return tensors


def _fit(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int | None, ...]]) -> bool:
    return tensors.keys() == shapes.keys() and all(
        tensors[name].ndim == 1 + len(shape)
        and all(wanted in (None, got) for wanted, got in zip(shape, tensors[name].shape[1:], strict=True))
        for name, shape in shapes.items()
    )
