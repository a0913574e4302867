"""Checkpoints: one safetensors file with everything needed to continue, checked before it is believed.

Tensors (parameters, buffers, optimiser moments, random number states) are stored under dotted names; all else is JSON
in the file's metadata. A file is written whole or not at all, carries a checksum of all that it holds, and has a copy
of the configuration that it belongs to.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dreamfusion_fast.errors import UserError, joined
from dreamfusion_fast.io import RunFolder, atomic_path, read_safetensors
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.config_io import architecture, differences

FORMAT = "dreamfusion_fast checkpoint"
VERSION = 2
OLDEST_VERSION = 1  # its checksum is of the tensors alone


# Raised by torch, safetensors and our own code for values of a wrong form, among them RecursionError.
_BAD_VALUES = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint file."""

    tensors: dict[str, torch.Tensor]
    """On the CPU, under the names they were saved with."""
    meta: dict[str, Any]
    """As save_checkpoint was given it."""
    config: Config
    """The configuration of the run."""
    step: int
    """Optimiser steps done."""

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose name starts with `prefix` and a dot, under the rest of their name."""
        return {name[len(prefix) + 1 :]: value for name, value in self.tensors.items() if name.startswith(prefix + ".")}


def save_checkpoint(
    path: str | Path,
    *,
    tensors: Mapping[str, torch.Tensor],
    config: Config,
    step: int,
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        path: file to write; an older one is replaced when the new one is complete.
        tensors: any dtypes and devices, under names of the caller's choice.
        config: the configuration of the run.
        step: optimiser steps done.
        meta: further values that JSON can hold.
    """
    # safetensors refuses tensors that share memory, and a checksum needs them contiguous.
    stored = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "step": str(step),
        "config": config.to_yaml(),
        "meta": json.dumps(dict(meta or {})),
    }
    metadata["checksum"] = str(_checksum(stored, metadata))
    with atomic_path(path) as temporary:
        save_file(stored, temporary, metadata=metadata)


def load_checkpoint(path: str | Path, expected_config: Config | None = None) -> Checkpoint:
    """Read a checkpoint and check it.

    Raises UserError where the file is absent, corrupt, no checkpoint of this package or of a later format, and, with
    `expected_config`, where the part of the configuration that decides the parameters differs: the message says in
    what.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")

    def corrupt(problem: BaseException | str) -> UserError:
        return UserError(f"checkpoint {path} is corrupt ({joined(problem)}); start the run again in another folder")

    try:
        tensors, metadata = read_safetensors(path)
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    except (SafetensorError, *_BAD_VALUES) as error:
        raise corrupt(error) from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is a safetensors file, but no checkpoint of dreamfusion_fast")
    version = metadata.get("version")
    if version not in [str(number) for number in range(OLDEST_VERSION, VERSION + 1)]:
        raise UserError(f"checkpoint {path} has format {version}, this dreamfusion_fast reads up to {VERSION}")
    try:
        checksum = int(metadata.pop("checksum"))
        step = int(metadata["step"])
        meta = json.loads(metadata["meta"])
        config_text = metadata["config"]
        if step < 0 or not isinstance(meta, dict):
            raise ValueError(f"step {step}, meta of type {type(meta).__name__}")
    except _BAD_VALUES as error:
        raise corrupt(f"bad metadata: {error}") from error
    if checksum != _checksum(tensors, {} if version == "1" else metadata):
        raise corrupt("its checksum is wrong")
    config = Config.from_yaml(config_text, source=f"checkpoint {path}")
    if expected_config is not None:
        different = differences(architecture(config), architecture(expected_config))
        if different:
            raise UserError(
                f"checkpoint {path} is of another config ({'; '.join(different)}); use its own or another folder"
            )
    return Checkpoint(tensors=tensors, meta=meta, config=config, step=step)


def run_config(folder: RunFolder) -> Config:
    """The configuration of a run: its config.yaml, or, where that is lost, the copy in its checkpoint."""
    if folder.config.is_file():
        return Config.load(folder.config)
    return load_checkpoint(folder.checkpoint).config


@contextmanager
def restoring() -> Iterator[None]:
    """Turn errors about the contents of a checkpoint into a UserError in one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _BAD_VALUES as error:
        said = joined(error) or type(error).__name__
        raise UserError(f"the checkpoint does not fit this config: {said}") from error


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split an optimiser's state into (tensors named optimizer.<parameter index>.<name>, other values for JSON)."""
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                values.setdefault(str(index), {})[name] = value
    return tensors, {"values": values, "param_groups": state["param_groups"]}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any]
) -> None:
    """Undo flatten_optimizer: load the state into `optimizer`, which has parameters of the same shapes and order.

    Raises UserError where the parameters differ, and what `restoring` catches where `rest` has another form.
    """
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in rest["values"].items()}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, entry = name.split(".", 2)
            state.setdefault(int(number), {})[entry] = value
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entries in state.items():
        for entry, value in entries.items():
            wanted = parameters[index].shape if index < len(parameters) else None
            if isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape != wanted:
                raise UserError(
                    f"the checkpoint's optimiser state {index}.{entry} has shape {list(value.shape)}, the "
                    f"parameter has {None if wanted is None else list(wanted)}; the checkpoint is of another config"
                )
    # JSON has no tuples; Adam unpacks betas either way, but a saved group should compare equal to the original.
    groups = [{key: tuple(v) if key == "betas" else v for key, v in group.items()} for group in rest["param_groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _checksum(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> int:
    total = 0
    for name in sorted(tensors):
        value = tensors[name]
        total = zlib.crc32(f"{name} {value.dtype} {list(value.shape)}".encode(), total)
        if value.numel():
            total = zlib.crc32(value.contiguous().reshape(-1).view(torch.uint8).numpy().data, total)
    for item in sorted(metadata.items()):
        total = zlib.crc32(repr(item).encode(), total)
    return total
