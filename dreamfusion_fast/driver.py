"""NVIDIA's driver and its GPUs, without torch: the build asks before torch is there, doctor when it fails.

The build loads this file by itself, so it imports nothing of the package.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from dataclasses import dataclass

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclass(frozen=True)
class Driver:
    """A driver that is there."""

    cuda: int
    """The newest CUDA that it serves: 13000 for 13.0, 12080 for 12.8; 0 if it does not say."""
    capabilities: tuple[int, ...]
    """Compute capabilities of its GPUs, 90 for 9.0, ascending, each once; empty where there is a driver, but no GPU."""

    @property
    def cuda_name(self) -> str:
        """`cuda` for people: "13.0"."""
        return f"{self.cuda // 1000}.{self.cuda % 1000 // 10}"


def find_driver() -> Driver | None:
    """The driver of this machine, None if there is none. Asks libcuda, and nvidia-smi for what that does not tell."""
    cuda, capabilities = _ask_libcuda()
    if not cuda or not capabilities:
        smi = _ask_smi()
        cuda, capabilities = cuda or smi[0], capabilities or smi[1]
    if not cuda and not capabilities:
        return None
    return Driver(cuda, tuple(sorted(set(capabilities))))


def _ask_libcuda() -> tuple[int, list[int]]:
    try:
        library = ctypes.CDLL("libcuda.so.1")
        version = ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
            return 0, []
        count = ctypes.c_int()
        if library.cuInit(0) != 0 or library.cuDeviceGetCount(ctypes.byref(count)) != 0:
            return version.value, []
        capabilities = []
        for index in range(count.value):
            device, values = ctypes.c_int(), [ctypes.c_int(), ctypes.c_int()]
            if library.cuDeviceGet(ctypes.byref(device), index) != 0:
                continue
            for value, attribute in zip(values, (_MAJOR, _MINOR), strict=True):
                library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            capabilities.append(10 * values[0].value + values[1].value)
        return version.value, capabilities
    except (OSError, AttributeError):  # absent, or not what it is called
        return 0, []


def _ask_smi() -> tuple[int, list[int]]:
    banner = _smi()
    named = re.search(r"CUDA (?:UMD )?Version:\s*(\d+)\.(\d+)", banner)
    cuda = 1000 * int(named[1]) + 10 * int(named[2]) if named else 0
    listed = _smi("--query-gpu=compute_cap", "--format=csv,noheader") if banner else ""
    return cuda, [10 * int(major) + int(minor) for major, minor in re.findall(r"(?m)^\s*(\d+)\.(\d)\s*$", listed)]


def _smi(*arguments: str) -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
