"""Whether the CUDA core is built, for which GPUs, and with which compiler: the toolkit's, or the one that PyPI has."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

# The whole compiler, 105 MB to download and 307 MB on disk. Its parts have to be of one version. The parts for CUDA 12
# that PyPI has lack nvcc itself.
COMPILER = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime<13.1,>=13.0",
    "nvidia-cuda-cccl<13.1,>=13.0",
)
OLDEST_DRIVER = 13000  # what this compiler makes runs on drivers for CUDA 13.0 and newer, those of later majors too
OLDEST_GPU = 75  # the oldest compute capability that it compiles for
MACHINES = ("x86_64", "aarch64")  # that these packages are made for, under Linux
PARTS = ("bin/nvcc", "nvvm/bin/cicc", "include/crt/host_config.h", "lib/libcudart_static.a", "include/cccl/cuda/std")
ANSWER_SECONDS = 120.0

_PACKAGE = Path(__file__).resolve().parents[2] / "dreamfusion_fast"


def _load_driver() -> ModuleType:
    # By its file: the package itself may not be importable while it is built.
    spec = importlib.util.spec_from_file_location("dreamfusion_fast_build.driver", _PACKAGE / "driver.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


driver = _load_driver()


@dataclass(frozen=True)
class Plan:
    """What CMake is told."""

    cuda: str
    """DREAMFUSION_FAST_CUDA of CMakeLists.txt."""
    archs: str = ""
    """DREAMFUSION_FAST_ARCHS of CMakeLists.txt."""
    gpus: str = ""
    """DREAMFUSION_FAST_GPUS of CMakeLists.txt."""
    reason: str = ""
    """Why there will be no CUDA core, for doctor."""
    toolkit: Path | None = None
    """The root of a compiler from PyPI; None for what CMake finds by itself."""

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """`environ` for CMake and the compilers that it starts."""
        changed = dict(environ)
        if self.toolkit is not None:
            changed["CUDACXX"] = str(self.toolkit / "bin" / "nvcc")
            # These packages keep their libraries in lib; nvcc looks in lib64.
            paths = [str(self.toolkit / "lib"), environ.get("LIBRARY_PATH", "")]
            changed["LIBRARY_PATH"] = os.pathsep.join(path for path in paths if path)
        return changed


def make_plan(choice: str, environ: Mapping[str, str]) -> Plan:
    """What to build for DREAMFUSION_FAST_CUDA=`choice`, "AUTO", "0" or "1", on this machine."""
    archs = environ.get("DREAMFUSION_FAST_ARCHS", "").strip()
    if choice == "0":
        return Plan("0", reason="it was built with DREAMFUSION_FAST_CUDA=0")
    found = driver.find_driver()
    gpus = ";".join(str(capability) for capability in found.capabilities) if found is not None else ""
    if choice == "AUTO" and not archs and not gpus:
        return Plan("0", reason="there was no GPU when it was built")
    if toolkit_nvcc(environ) is not None:
        return Plan(choice, archs, gpus)
    toolkit = None if environ.get("CUDACXX", "").strip() else pypi_toolkit()
    if choice == "AUTO" and toolkit is None:
        return Plan("0", reason=f"nvcc was not found when it was built{_why_not_pypi(found)}")
    return Plan(choice, archs, gpus, toolkit=toolkit)


def _why_not_pypi(found: Any) -> str:
    if found is None or not found.cuda:
        return ""
    if found.cuda < OLDEST_DRIVER:
        return (
            f", and the compiler on PyPI wants a driver for CUDA 13.0 (580 or newer); this is one for {found.cuda_name}"
        )
    if not any(capability >= OLDEST_GPU for capability in found.capabilities):
        return ", and the compiler on PyPI compiles for compute capability 7.5 and newer"
    return ", and the compiler on PyPI could not be had"


def toolkit_nvcc(environ: Mapping[str, str]) -> str | None:
    """nvcc of an installed toolkit, looked for where `cmake/cuda.cmake` does; what CUDACXX names excludes others."""
    named = environ.get("CUDACXX", "").strip()
    if named:
        return shutil.which(named, path=environ.get("PATH"))
    homes = [environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [os.path.join(home, "bin") for home in homes if home]
    places += [environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(place for place in places if place))


def pypi_toolkit() -> Path | None:
    """The compiler that PyPI's packages put into this environment; None unless all of it is there."""
    for entry in sys.path:
        root = Path(entry) / "nvidia" / "cu13"
        if all((root / part).exists() for part in PARTS):
            return root
    return None


def compiler_wanted(environ: Mapping[str, str]) -> bool:
    """Whether a GPU is here that PyPI's compiler serves, and no toolkit, and the CUDA core was not declined."""
    if environ.get("DREAMFUSION_FAST_CUDA", "").strip() == "0" or platform.system() != "Linux":
        return False
    if platform.machine() not in MACHINES or environ.get("CUDACXX", "").strip() or toolkit_nvcc(environ) is not None:
        return False
    found = driver.find_driver()
    if found is None or found.cuda < OLDEST_DRIVER:
        return False
    return any(capability >= OLDEST_GPU for capability in found.capabilities)


def compiler_requirements() -> list[str]:
    """The packages of the compiler, where it is wanted and can be had; with them the build makes the CUDA core.

    An installation in which a requirement cannot be fetched ends there, before this package is asked. So pip is asked
    first whether it finds them, which costs a few kilobytes.
    """
    if not compiler_wanted(os.environ) or pypi_toolkit() is not None:
        return []
    if not can_be_fetched(COMPILER):
        print(
            "dreamfusion_fast: there is a GPU, but no nvcc, and pip does not find that of PyPI, so only the CPU core "
            "is built. Install the CUDA toolkit and then this again, or this again where pip reaches PyPI.",
            file=sys.stderr,
        )
        return []
    return list(COMPILER)


def can_be_fetched(requirements: tuple[str, ...]) -> bool:
    """Whether pip, as it is configured here, finds all of them. True without pip: the installer is another one."""
    # A build environment has no pip of its own and hides the one outside by these variables.
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
    command += ["--only-binary=:all:", "--retries=1", "--timeout=15", "--disable-pip-version-check", *requirements]
    try:
        done = subprocess.run(
            command, cwd=sys.prefix, env=environ, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 or "No module named pip" in done.stderr
