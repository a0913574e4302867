"""Which tests run: `quick(n)`, which marks the cases after the first n as slow, and `--seconds`.

Imported by `conftest.py`; by itself it is a plugin that needs pytest alone.
"""

from __future__ import annotations

import math
import time
from collections import Counter

import pytest

_BEGAN, _CASES = pytest.StashKey[float](), pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, default=math.inf, help="skip what would begin later, and count it")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_BEGAN] = time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what there is no time for, before any fixture of it is made."""
    seconds = item.config.getoption("seconds")
    if time.monotonic() - item.config.stash[_BEGAN] > seconds:
        pytest.skip(f"not begun within --seconds {seconds:g}")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Marks the cases that `quick` leaves out. Those that need a GPU do not count."""
    quick = item.get_closest_marker("quick")
    if quick is None or item.get_closest_marker("gpu") is not None:
        return
    cases = item.config.stash.setdefault(_CASES, Counter())
    function = item.nodeid.partition("[")[0]
    cases[function] += 1
    if cases[function] > quick.args[0]:
        item.add_marker("slow")
