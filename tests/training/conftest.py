"""One thread, since tensors are too small to share out and bits are compared, and quick exports; and a fixture."""

from __future__ import annotations

import pytest
from fakes import look_small

from dreamfusion_fast import Generator
from dreamfusion_fast.training.config import Config


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For all tests here."""


@pytest.fixture(autouse=True)
def _small_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all tests here."""
    look_small(monkeypatch)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Configs that the command line would have run."""
    configs: list[Config] = []

    def remember(self: Generator, prompt: Config, **options: object) -> None:
        configs.append(prompt)
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "__init__", remember)
    return configs
