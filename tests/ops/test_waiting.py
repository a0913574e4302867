"""Threads of the CPU core do not wait awake where other processes want their cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dreamfusion_fast

CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def run(code: str, **environment: str) -> str:
    """What a Python of its own prints, with no way of waiting in the environment but those given."""
    rest = {name: value for name, value in os.environ.items() if name not in CHOICES}
    # From where the package under test lies: a source tree as working folder would hide an installed one.
    folder = Path(dreamfusion_fast.__file__).parents[1]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=rest | environment, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def chosen(code: str, **environment: str) -> list[str]:
    return run(f"import os; {code}; print(*[os.environ.get(x) for x in {CHOICES!r}])", **environment).split()


def test_the_package_says_how_long_threads_wait_awake() -> None:
    assert chosen("import dreamfusion_fast") == ["None", "10000"]
    assert chosen("import dreamfusion_fast.cli") == ["None", "10000"]


def test_a_choice_of_the_user_stays() -> None:
    assert chosen("import dreamfusion_fast", OMP_WAIT_POLICY="ACTIVE") == ["ACTIVE", "None"]
    assert chosen("import dreamfusion_fast", GOMP_SPINCOUNT="7") == ["None", "7"]


def test_nothing_is_said_to_a_torch_that_is_loaded() -> None:
    assert chosen("import torch, dreamfusion_fast") == ["None", "None"]


# Calls an op on two threads beside a busy process for each core, until there are more threads than before or for some
# seconds; prints how many more.
CROWDED = """
import os, subprocess, sys, time, torch
from dreamfusion_fast import ops
torch.set_num_threads(2)
rays = torch.rand(200_000, 3), torch.rand(200_000, 3), torch.arange(6.0)
def threads():
    ops.ray_box(*rays)
    return len(os.listdir("/proc/self/task"))
before = threads()
busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
try:
    start = time.monotonic()
    while threads() < before + 2 and time.monotonic() - start < SECONDS: pass
    print(threads() - before)
finally:
    for process in busy:
        process.kill()
        process.wait()
"""


FEW = sys.platform == "linux" and len(os.sched_getaffinity(0)) <= 4


@pytest.mark.slow
@pytest.mark.skipif(not FEW, reason="on Linux, threads are added where that takes few")
@pytest.mark.parametrize(("environment", "seconds"), [({}, 60), ({"OMP_WAIT_POLICY": "ACTIVE"}, 2)])
def test_threads_sleep_beside_busy_processes_where_torch_was_first(environment: dict[str, str], seconds: int) -> None:
    more = int(run(CROWDED.replace("SECONDS", str(seconds)), **environment))
    assert (more >= 2) == (not environment)
