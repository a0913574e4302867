"""What pytest runs when it is called without a choice, and for how long."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import selection

TESTS = """
import pytest, time

@pytest.mark.quick(2)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
@pytest.mark.parametrize("size", [1, 113, 1023])
def test_many(size, device):
    time.sleep(0.3)

@pytest.mark.slow
def test_long():
    pass
"""


@pytest.fixture
def said(tmp_path: Path):
    """Called with arguments: the lines of pytest in a folder with the tests above and our settings."""
    (tmp_path / "test_it.py").write_text(TESTS)
    settings = Path(__file__).parents[1] / "pyproject.toml"
    (tmp_path / "pyproject.toml").write_bytes(settings.read_bytes())
    environ = os.environ | {"PYTHONPATH": str(Path(selection.__file__).parent), "PYTEST_ADDOPTS": ""}
    environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # quicker

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "pytest", "-p", "selection", "test_it.py", "-v", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_the_first_cases_are_quick(said):
    cases = [line.split("[")[1].split("]")[0] for line in said().splitlines() if "PASSED" in line]
    assert cases == ["1-cuda", "1-cpu", "113-cuda", "113-cpu", "1023-cuda"]
    assert "2 passed" in said("-m", "slow")


def test_those_that_would_begin_too_late_are_skipped(said):
    out = said("--seconds", "0.4", "-m", "")
    assert "not begun within --seconds 0.4" in out
    assert "test_long SKIPPED" in out
