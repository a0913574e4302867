"""Whether Triton can run kernels for a device, and if not, why."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_LEAST_CAPABILITY = (8, 0)
_LEAST_TRITON = (3, 4)  # 3.3, the triton of torch 2.7, fails to compile the widest MLPs for compute capability 9.0


def triton_reason(device: torch.device | str) -> str:
    """Why Triton kernels cannot be used on a device; empty when they can.

    With ``TRITON_INTERPRET=1`` in the environment when the process starts, Triton's interpreter runs the kernels on CPU
    tensors, slowly: it is how a machine without a GPU tests them.
    """
    device = torch.device(device)
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton compiles for GPUs, and a CPU runs matrix products as well without it"
    if device.type not in ("cpu", "cuda"):
        return f"no Triton kernels for device {device}"
    return version_reason() or ("" if device.type == "cpu" else _gpu_reason(device))


def triton_serves(device: torch.device | str) -> bool:
    """Whether Triton kernels can be used on a device."""
    return triton_reason(device) == ""


def on_its_device(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, run where its first tensor lies: Triton launches on the current GPU, wherever its arguments are."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        with nullcontext() if first is None else torch.cuda.device_of(first):  # which does nothing for a CPU
            return function(*args, **kwargs)

    return run


@functools.cache
def version_reason() -> str:
    """Why the triton that is installed does not serve; empty when it does."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (PyTorch's CUDA builds for Linux bring it)"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # nightly builds of PyTorch bring it under another name
        return ""
    if tuple(int(number) for number in version.split(".")[:2]) < _LEAST_TRITON:
        return f"triton {version} is older than {'.'.join(map(str, _LEAST_TRITON))}, which torch 2.8 brings"
    return ""


@functools.cache
def _gpu_reason(device: torch.device) -> str:
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch finds no usable CUDA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < _LEAST_CAPABILITY:
        return f"the GPU has compute capability {major}.{minor}, Triton wants 8.0 or newer"
    return ""
