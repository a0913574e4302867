"""Fixtures for all tests: where they run, and one thread for what they time or compare."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pipelines import own_pipeline, pipeline  # noqa: F401 (fixtures)
from selection import pytest_addoption, pytest_configure, pytest_itemcollected, pytest_runtest_setup  # noqa: F401

from dreamfusion_fast.ops import _native


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips, and so counts, what needs a GPU where none can be used, and says why."""
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
