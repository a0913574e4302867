"""Threads of the CPU core do not wait awake where other processes want their cores."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def run(code: str, **environment: str) -> str:
    """What a Python of its own prints, with no way of waiting in the environment but those given."""
    rest = {name: value for name, value in os.environ.items() if name not in CHOICES}
    done = subprocess.run(
        [sys.executable, "-c", code], env=rest | environment, capture_output=True, text=True, check=False
    )
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


# Calls an op on two threads until this process has more threads than it had, or for some seconds; prints how many more.
CROWDED = """
import os, time, torch
from dreamfusion_fast import ops
torch.set_num_threads(2)
rays = torch.rand(200_000, 3), torch.rand(200_000, 3), torch.arange(6.0)
def threads():
    ops.ray_box(*rays)
    return len(os.listdir("/proc/self/task"))
before, start = threads(), time.monotonic()
while threads() < before + 2 and time.monotonic() - start < SECONDS: pass
print(threads() - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) > 4, reason="Linux; threads are added if few do")
@pytest.mark.parametrize(("environment", "more"), [({}, True), ({"OMP_WAIT_POLICY": "ACTIVE"}, False)])
def test_threads_sleep_beside_busy_processes_where_torch_was_first(environment: dict[str, str], more: bool) -> None:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    try:
        found = int(run(CROWDED.replace("SECONDS", "60" if more else "2"), **environment))
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert (found >= 2) == more
