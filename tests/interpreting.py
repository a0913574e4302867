"""Triton's interpreter, which runs kernels on a CPU, but only if it is asked for before triton is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import dreamfusion_fast
from dreamfusion_fast.ops._triton import version_reason

needs_triton = pytest.mark.skipif(version_reason() != "", reason=version_reason())


def run_interpreted(script: str) -> dict[str, str]:
    """Run a script, named from this folder, in a process of its own; it prints what went wrong, by case, as JSON."""
    places = [Path(dreamfusion_fast.__file__).parents[1], Path(__file__).parent]
    path = os.pathsep.join([*map(str, places), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, Path(__file__).parent / script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    failures: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return failures


def print_failures(checks: Mapping[str, Callable[[], None]]) -> None:
    """The other end of `run_interpreted`: run all checks, and print what went wrong, by the names of the checks."""
    failures = {}
    for name, check in checks.items():
        try:
            check()
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(failures))
