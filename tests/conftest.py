"""Fixtures for all tests: where they run, and one thread for what they time or compare."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pipelines import own_pipeline, pipeline  # noqa: F401 (fixtures)

from dreamfusion_fast.ops import _native

_BEGAN = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, default=math.inf, help="skip, and say so, what would begin later")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_BEGAN] = time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what there is no time for, before any fixture of it is made."""
    seconds = item.config.getoption("seconds")
    if time.monotonic() - item.config.stash[_BEGAN] > seconds:
        pytest.skip(f"not begun within --seconds {seconds:g}")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips, and so counts, what needs a GPU where none can be used, and says why; marks what is slow."""
    cases: Counter[str] = Counter()
    for item in items:
        quick = item.get_closest_marker("quick")
        if quick is not None and item.get_closest_marker("gpu") is None:
            function = item.nodeid.partition("[")[0]
            cases[function] += 1
            if cases[function] > quick.args[0]:
                item.add_marker("slow")
    if not _native.cuda_available():
        skip = pytest.mark.skip(reason=f"needs a GPU: {_native.cuda_reason().split('. ')[0]}")
        for item in items:
            if item.get_closest_marker("gpu") is not None:  # the keywords hold names of folders, too
                item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and as a test of its own, the GPU."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Each test starts from the same random state, whatever ran before it, and leaves none behind."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Called: the lines that the package has logged since the last call, as the command line shows them."""
    caplog.set_level(logging.INFO, "dreamfusion_fast")

    def lines() -> list[str]:
        messages = [record.getMessage() for record in caplog.records if record.name.startswith("dreamfusion_fast")]
        caplog.clear()
        return messages

    return lines


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the embeddings of the person who runs it."""
    monkeypatch.setenv("DREAMFUSION_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tensors that are too small to share out, or whose bits are compared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 is to be float32, in convolutions, too."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
