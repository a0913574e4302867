"""The machine that figures were measured on, and the one form in which they are written down.

A result is a JSON file: the machine's description at the top, `rows` below it.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import dreamfusion_fast

RESULTS = Path(__file__).parent / "results"


def describe(device: torch.device) -> dict[str, str | int | float]:
    """The device and the versions. What cannot be found out is an empty string.

    The commit is the environment variable DREAMFUSION_FAST_COMMIT if it is set (a copy of the sources has no git), else
    what git says.
    """
    gpu = device.type == "cuda"
    about: dict[str, str | int | float] = {"device": torch.cuda.get_device_name(device) if gpu else _cpu_name()}
    if gpu:
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        }
    return about | {
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 0,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "triton": _version("triton"),
        "dreamfusion_fast": dreamfusion_fast.__version__,
        "commit": os.environ.get("DREAMFUSION_FAST_COMMIT")
        or _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def headline(about: dict[str, str | int | float]) -> str:
    """The description in one line."""
    return ", ".join(f"{key} {value}" for key, value in about.items() if value)


def write_result(folder: Path, suite: str, about: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Path:
    """Write `<suite>-<device>.json` into `folder` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{suite}-{slug(str(about['device']))}.json"
    rounded = [{key: _rounded(value) for key, value in row.items()} for row in rows]
    path.write_text(json.dumps({"suite": suite, **about, "rows": rounded}, indent=1) + "\n")
    return path


def slug(name: str) -> str:
    """A device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _rounded(value: Any) -> Any:
    """Five significant digits: more is noise that makes every rerun a longer diff."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    """The output of a command, run in this folder; empty if it fails or is not there."""
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run.stdout.strip()
