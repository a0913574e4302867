"""A report on this machine: what works, what is missing, and at its end a verdict and the command that mends it.

Every check stands on its own and survives the failure of what it looks at: this is run when something is broken.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from dreamfusion_fast import __version__
from dreamfusion_fast.driver import find_driver
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
    """How to get what is missing: a command, or where there is none, words."""
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
    lines += ["", *_verdict(checks)]
    return "\n".join(lines)


def _verdict(checks: list[Check]) -> list[str]:
    """One line that says whether a run can start and on what, and one with what to do first, if anything is."""
    fatal = [check for check in checks if check.fatal]
    wrong = fatal or [check for check in checks if check.status == "missing"]
    if fatal:
        verdict = f"{_DISTRIBUTION} generate cannot run yet; missing: {', '.join(check.name for check in fatal)}."
    else:
        gpu = any(check.name == "CUDA core" and check.status == "ok" for check in checks)
        but = f"; not as it should be: {', '.join(check.name for check in wrong)}" if wrong else ""
        verdict = f"{_DISTRIBUTION} generate can run, on the {'GPU' if gpu else 'CPU'}{but}."
    remedy = next((check.remedy for check in wrong if check.remedy), "")
    return [verdict, f"Mend it: {remedy}"] if remedy else [verdict]


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
        remedy = f"pip install {_source('[generate]')}"
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
    driver = find_driver()
    if driver is None or not driver.capabilities:
        return [Check("GPU", "note", "none; runs use the CPU")]
    # PyPI's torch is built with CUDA 13 from 2.11 on, and with CUDA 12 before, which older drivers serve.
    remedy = f"pip install --force-reinstall {'torch' if driver.cuda >= 13000 else shlex.quote('torch<2.11')}"
    if torch.version.cuda is None:
        return [Check("GPU", "missing", "there is one, but this torch is built without CUDA", remedy)]
    if driver.cuda and driver.cuda // 1000 < int(torch.version.cuda.partition(".")[0]):
        text = f"there is one, but its driver is for CUDA {driver.cuda_name}, and this torch for {torch.version.cuda}"
        return [Check("GPU", "missing", text, remedy)]
    return [Check("GPU", "missing", "there is one, but torch cannot use it", "nvidia-smi, which says more")]


def _cpu_core() -> list[Check]:
    from dreamfusion_fast.ops import _native

    if _native.cpu_available():
        return [Check("CPU core", "ok", f"built for {_native.cpu_target()}")]
    return [Check("CPU core", "missing", _native.cpu_reason(), _rebuild(), fatal=not _native.cuda_available())]


def _cuda_core() -> list[Check]:
    import torch

    from dreamfusion_fast.ops import _native

    built = _native.cuda_architectures()
    if not torch.cuda.is_available():
        text = f"built for {built}; not used: {_native.cuda_reason()}" if built else _native.cuda_reason()
        return [Check("CUDA core", "note", text)]
    capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    gpus = sorted({10 * major + minor for major, minor in capabilities})
    if not _native.cuda_available():
        return [Check("CUDA core", "missing", _native.cuda_reason(), _cuda_remedy(gpus))]
    unserved = [gpu for gpu in gpus if not _serves(built, gpu)]
    if unserved:
        names = ", ".join(f"{gpu // 10}.{gpu % 10}" for gpu in unserved)
        text = f"built for {built}, which GPUs of compute capability {names} do not run"
        return [Check("CUDA core", "missing", text, _cuda_remedy(gpus))]
    return [Check("CUDA core", "ok", f"built for {built}")]


def _serves(built: str, gpu: int) -> bool:
    """Whether a GPU of compute capability `gpu`, 90 for 9.0, runs what was compiled for "80-real 90".

    Machine code runs on GPUs of the same major version and no lower minor one; PTX, which is there unless it says
    "real", on all that are newer.
    """
    for arch in built.split():
        number = int(re.match(r"\d+", arch)[0])  # type: ignore[index]
        exact = arch.removesuffix("-real").endswith(("a", "f"))
        if number == gpu or (not exact and number < gpu and ("real" not in arch or number // 10 == gpu // 10)):
            return True
    return False


def _cuda_remedy(gpus: list[int]) -> str:
    """The command after which the CUDA core is there."""
    driver = find_driver()
    if _toolkit() or (driver is not None and driver.cuda >= 13000 and max(gpus, default=0) >= 75):
        return _rebuild()  # which brings a compiler where there is none
    return f"apt install nvidia-cuda-toolkit && {_rebuild()}"


def _toolkit() -> str | None:
    """nvcc of an installed toolkit, looked for where the build does."""
    if os.environ.get("CUDACXX"):
        return shutil.which(os.environ["CUDACXX"])
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which("nvcc", path=os.pathsep.join(places))


def _rebuild() -> str:
    # pip may have kept the wheel that it made of this source tree before.
    return f"pip install --force-reinstall --no-deps --no-cache-dir {_source()}"


def _source(extra: str = "") -> str:
    """What pip is to install again: the source tree that this package was installed from, if there was one."""
    origin = json.loads(_direct_url() or "{}")
    url = origin.get("url", "")
    if not url.startswith("file://") or "dir_info" not in origin:
        return f'"{_DISTRIBUTION}{extra}"' if extra else f"--no-binary {_DISTRIBUTION} {_DISTRIBUTION}"
    editable = "-e " if origin["dir_info"].get("editable") else ""
    return f"{editable}{shlex.quote(unquote(urlsplit(url).path) + extra)}"


def _direct_url() -> str | None:
    """What pip has noted, in JSON (PEP 610), of where it installed this package from; None if it came from an index."""
    try:
        return importlib.metadata.distribution(_DISTRIBUTION).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None


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
        return [
            Check("embedded prior", "missing", f"no {' and no '.join(absent)} in the package", _rebuild(), fatal=True)
        ]
    size = sum(file.stat().st_size for file in files) / 2**20
    return [Check("embedded prior", "ok", f"{', '.join(file.name for file in files)} ({size:.0f} MiB)")]


def _ffmpeg() -> list[Check]:
    import imageio_ffmpeg

    try:
        imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        remedy = "pip install --force-reinstall imageio-ffmpeg"
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
