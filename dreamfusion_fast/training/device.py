"""Which device a run uses, and how values get there."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.ops._native import cuda_available, cuda_reason


def resolve_device(name: str = "auto") -> torch.device:
    """The device called `name`: "auto", "cpu", "cuda" or "cuda:1". "auto" is the GPU if there is one and the CUDA core
    was built; it warns where only the core is missing.

    Raises UserError for another name, and for a GPU that is not there.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        if not cuda_available():
            warnings.warn(f"the GPU is not used: {cuda_reason()}; see dreamfusion-fast doctor", stacklevel=2)
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"unknown device {name!r}; give auto, cpu, cuda or cuda:1")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds no GPU"
        raise UserError(f"device {name} was asked for, but {built}; use --device cpu, or run dreamfusion-fast doctor")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise UserError(f"device {name} was asked for, but there are {torch.cuda.device_count()} GPUs, counted from 0")
    return torch.device("cuda", index)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Within it, a GPU is the current one, for all that asks no tensor where it lies: events, streams, libraries."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def send(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """Tensors of one dtype from the CPU to `device`: to a GPU in one copy that nothing waits for.

    Each copy from ordinary memory makes the host wait until the GPU has done all that it was given before. From pinned
    memory it does not, and torch keeps the pinned block until the copy is done.

    Returns:
        As many tensors, in order, of the same shapes; on a GPU they share one block of memory.
    """
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    packed = torch.cat([tensor.reshape(-1) for tensor in tensors]).pin_memory().to(device, non_blocking=True)
    parts = packed.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
