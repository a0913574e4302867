"""A report on this machine: what works, what is missing, and how to get it.

Every check stands on its own and survives the failure of what it looks at: this is run when something is broken.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dreamfusion_fast import __version__
from dreamfusion_fast.errors import joined

Status = Literal["ok", "note", "missing"]
_DISTRIBUTION = "dreamfusion-fast"
_GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Status
    text: str
    remedy: str = ""
    """How to get what is missing."""
    fatal: bool = False
    """Without it, no run can start."""


def examine() -> list[Check]:
    """Look at everything. Never raises: a check that fails says so in its own line."""
    checks: list[Check] = []
    for look in (_python, _packages, _torch, _gpus, _cpu_core, _cuda_core, _triton, _prior, _ffmpeg, _memory, _disk):
        try:
            checks.extend(look())
        except ModuleNotFoundError as error:  # _packages says how to get it
            checks.append(Check(look.__name__.strip("_"), "note", f"not looked at: {error.name} is not installed"))
        except Exception as error:  # a broken part must not hide the rest
            checks.append(Check(look.__name__.strip("_"), "missing", f"{type(error).__name__}: {error}"))
    return checks


def report(checks: list[Check]) -> str:
    """The checks as text, with the verdict at the end."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:>7}  {check.name:<{width}}  {check.text}")
        if check.remedy:
            lines.append(f"{'':>7}  {'':<{width}}  -> {check.remedy}")
    fatal = [check.name for check in checks if check.fatal]
    lines.append("")
    if fatal:
        lines.append(f"{_DISTRIBUTION} generate cannot run yet; missing: {', '.join(fatal)}.")
    else:
        gpu = any(check.name == "CUDA core" and check.status == "ok" for check in checks)
        lines.append(f"{_DISTRIBUTION} generate can run, on the {'GPU' if gpu else 'CPU'}.")
    return "\n".join(lines)


def _python() -> list[Check]:
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    return [Check("dreamfusion_fast", "ok", f"{__version__}, Python {platform.python_version()}, {machine}")]


def _packages() -> list[Check]:
    """The packages that a run needs, the extra's too: a line of those that are there, one of those that are not."""
    try:
        lines = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return [Check("packages", "note", "dreamfusion_fast is not installed, only importable", "pip install .")]
    required = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines if _for_a_run(line)]
    versions = {name: _version(name) for name in required}
    found = [f"{name} {version}" for name, version in versions.items() if version is not None]
    missing = [name for name, version in versions.items() if version is None]
    checks = [Check("packages", "ok", ", ".join(found))] if found else []
    if missing:
        remedy = f'pip install "{_DISTRIBUTION}[generate]"'
        checks.append(Check("packages", "missing", f"not installed: {', '.join(missing)}", remedy, fatal=True))
    return checks


def _for_a_run(requirement: str) -> bool:
    extra = re.search(r"""extra == ["']([^"']+)""", requirement)
    return extra is None or extra[1] == "generate"


def _torch() -> list[Check]:
    try:
        import torch
    except Exception as error:  # a broken installation raises OSError and others
        return [Check("torch", "missing", f"does not import: {error}", "pip install torch", fatal=True)]
    built = "CPU only" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
    return [Check("torch", "ok", f"{torch.__version__} ({built}), {torch.get_num_threads()} threads")]


def _gpus() -> list[Check]:
    import torch

    if torch.cuda.is_available():
        checks = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            try:
                free, total = torch.cuda.mem_get_info(index)
                memory = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
            except RuntimeError as error:
                memory = f"cannot be used: {joined(error)}"
            text = f"{properties.name}, compute capability {properties.major}.{properties.minor}, {memory}"
            checks.append(Check(f"GPU {index}", "ok" if "free" in memory else "missing", text))
        return checks
    if torch.version.cuda is None and os.path.exists("/dev/nvidia0"):
        remedy = "install a CUDA build of torch, see https://pytorch.org/get-started/locally"
        return [Check("GPU", "missing", "there is one, but this torch is built without CUDA", remedy)]
    return [Check("GPU", "note", "none; runs use the CPU")]


def _cpu_core() -> list[Check]:
    from dreamfusion_fast.ops import _native

    if _native.cpu_available():
        return [Check("CPU core", "ok", "built")]
    return [Check("CPU core", "missing", _native.cpu_reason(), fatal=not _native.cuda_available())]


def _cuda_core() -> list[Check]:
    import torch

    from dreamfusion_fast.ops import _native

    built = _native.cuda_architectures()
    if _native.cuda_available():
        return [Check("CUDA core", "ok", f"built for {built}")]
    if built and not torch.cuda.is_available():
        return [Check("CUDA core", "note", f"built for {built}; not used: {_native.cuda_reason()}")]
    return [Check("CUDA core", "missing" if torch.cuda.is_available() else "note", _native.cuda_reason())]


def _triton() -> list[Check]:
    version = _version("triton")
    if version is None:
        return [Check("triton", "note", "absent: fused kernels on a GPU; comes with PyTorch's CUDA builds")]
    return [Check("triton", "ok", version)]


# As `guidance.models.embedded.text_encoder` has it, which cannot be imported where something is missing.
_WEIGHTS = "guidance/models/embedded/weights"


def _prior() -> list[Check]:
    folder = Path(__file__).parent / _WEIGHTS
    files = sorted(folder.glob("*.safetensors.gz"))
    found = {"text encoder" if file.name.startswith("text_encoder.") else "image model" for file in files}
    absent = [part for part in ("text encoder", "image model") if part not in found]
    if absent:
        remedy = "install the package again: pip install --force-reinstall --no-deps ."
        return [Check("embedded prior", "missing", f"no {' and no '.join(absent)} in the package", remedy, fatal=True)]
    size = sum(file.stat().st_size for file in files) / 2**20
    return [Check("embedded prior", "ok", f"{', '.join(file.name for file in files)} ({size:.0f} MiB)")]


def _ffmpeg() -> list[Check]:
    import imageio_ffmpeg

    try:
        imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        remedy = "install ffmpeg, or go without the video: --export.turntable-frames 0"
        return [Check("ffmpeg", "missing", joined(error), remedy)]
    return [Check("ffmpeg", "ok", imageio_ffmpeg.get_ffmpeg_version())]


def _memory() -> list[Check]:
    free = free_memory()
    if free is None:
        return [Check("memory", "note", "free memory is unknown on this system")]
    enough = free >= 4 * _GIB
    remedy = "" if enough else "a run on the CPU wants 4 GiB; close other programs"
    return [Check("memory", "ok" if enough else "note", f"{free / _GIB:.1f} GiB free", remedy)]


def _disk() -> list[Check]:
    from dreamfusion_fast.errors import UserError
    from dreamfusion_fast.guidance.cache import default_cache_dir

    checks = []
    places: dict[str, Path] = {"disk, this folder": Path.cwd()}
    try:
        places["disk, cache"] = default_cache_dir()
    except UserError as error:
        checks.append(Check("disk, cache", "note", str(error)))
    for name, place in places.items():
        existing = next(folder for folder in (place, *place.parents) if folder.is_dir())
        free = shutil.disk_usage(existing).free
        writable = os.access(existing, os.W_OK)
        text = f"{place}: {free / _GIB:.1f} GiB free{'' if writable else ', not writable'}"
        checks.append(Check(name, "ok" if writable and free > _GIB // 4 else "note", text))
    return checks


def free_memory() -> int | None:
    """Bytes that a new process can use without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            values = dict(line.split(":", 1) for line in file)
        free = int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    # A container may be allowed less than the machine has.
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return free


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
