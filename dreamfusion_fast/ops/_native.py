"""The one door to the native core: which parts of it there are, and how a function of it is called for a tensor.

Both modules, `_core` (CPU) and `_core_cuda`, offer the same functions (`csrc/bindings.cpp` names the exceptions):
addresses, sizes, and last the thread count or the CUDA stream. An op calls them as
``call("ray_box", origins, pointer(origins), ..., n_rays)``.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_REBUILD = "pip install . (in the source tree; DREAMFUSION_FAST_CUDA=1 makes a missing nvcc an error)"
_SUFFIXES = {torch.float32: "_f32", torch.float64: "_f64"}


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    """The extension module, or None and why it cannot be loaded. For `_core`, the one of its kind that suits best."""
    try:
        module = importlib.import_module(f"dreamfusion_fast.{name}")
        return (_best_variant(module), "") if name == "_core" else (module, "")
    except ImportError as error:
        return None, str(error)


def _best_variant(core: ModuleType) -> ModuleType:
    """The CPU core to use: of a wheel's several the best that this processor runs, or what DREAMFUSION_FAST_CPU names.

    Raises ImportError for a name that is none of these.
    """
    names: list[str] = core.cpu_variants()
    asked = os.environ.get("DREAMFUSION_FAST_CPU", "").strip().lower()
    if asked:
        choices = {"baseline": "_core", **{name.removeprefix("_core_"): name for name in names}}
        if asked not in choices:
            raise ImportError(f"DREAMFUSION_FAST_CPU={asked}: this build and processor offer {', '.join(choices)}")
        names = [choices[asked]]
    return importlib.import_module(f"dreamfusion_fast.{names[0]}") if names else core


def cpu_reason() -> str:
    """Why the CPU core cannot be used; empty when it can."""
    module, reason = _load("_core")
    if module is not None:
        return ""
    root = Path(__file__).resolve().parents[2]
    hidden = ""
    if (root / "CMakeLists.txt").is_file():
        hidden = f". This is the source tree {root}, which hides an installed package: use another working folder"
    return f"the CPU core was not built or does not load: {reason}. Build it: {_REBUILD}{hidden}"


def cuda_reason() -> str:
    """Why the CUDA core cannot be used; empty when it can."""
    module, reason = _load("_core_cuda")
    if module is None:
        cpu, _ = _load("_core")
        why = getattr(cpu, "cuda_reason", "") or reason
        return f"the CUDA core is not there: {why}"
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no usable CUDA GPU"
    return ""


def cpu_available() -> bool:
    """Whether ops run natively on CPU tensors."""
    return cpu_reason() == ""


def cuda_available() -> bool:
    """Whether ops run natively on CUDA tensors: the core was built, and torch has a GPU to run it on."""
    return cuda_reason() == ""


def cpu_target() -> str:
    """The processors that the CPU core in use was compiled for, in words; empty when there is none."""
    module, _ = _load("_core")
    return module.cpu_target if module is not None else ""


def cuda_architectures() -> str:
    """The architectures that the CUDA core was compiled for, e.g. ``"80-real 90"``; empty when there is none."""
    module, _ = _load("_core_cuda")
    return module.cuda_archs if module is not None else ""


def pointer(tensor: Tensor | None) -> int:
    """The address of a contiguous tensor's first element; 0 for None."""
    if tensor is None:
        return 0
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def strided(tensor: Tensor | None) -> tuple[int, int, int]:
    """A tensor `[n, channels]` of any strides as the native core takes it: address and both strides in elements."""
    if tensor is None:
        return 0, 0, 0
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)


def call(name: str, like: Tensor, *arguments: Any) -> None:
    """Calls the native function `name` on the device of `like`, on torch's current stream there.

    A function that exists for several dtypes is called for the dtype of `like`.

    Raises:
        RuntimeError: no native core for that device, or the launch failed.
        TypeError: a dtype the core has no code for.
    """
    device = like.device
    function = function_of(name, device.type, like.dtype)
    if device.type == "cpu":
        function(*arguments, torch.get_num_threads())
    elif torch.cuda.current_device() == device.index:
        function(*arguments, torch._C._cuda_getCurrentRawStream(device.index))
    else:
        with torch.cuda.device(device):
            function(*arguments, torch._C._cuda_getCurrentRawStream(device.index))


@functools.cache
def function_of(name: str, device_type: str, dtype: torch.dtype) -> Callable[..., None]:
    """The native function that `call` calls; the errors are those of `call`."""
    if device_type not in ("cpu", "cuda"):
        raise RuntimeError(f"{name}: no native core for device {device_type}, only for cpu and cuda")
    module, _ = _load("_core" if device_type == "cpu" else "_core_cuda")
    if module is None:
        reason = cpu_reason() if device_type == "cpu" else cuda_reason()
        raise RuntimeError(f"{name}: {reason}; dreamfusion-fast doctor says what to do")
    function = getattr(module, name + _SUFFIXES.get(dtype, ""), None) or getattr(module, name, None)
    if function is None:
        raise TypeError(f"{name}: the native core has no code for {dtype}")
    return function
