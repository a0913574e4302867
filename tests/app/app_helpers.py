"""Helpers of the app's tests."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

FAKE = (sys.executable, str(Path(__file__).with_name("fake_run.py")))


def until(reached: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for it, which takes a moment, and fail where it never comes."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "it has not come"
        time.sleep(0.02)
