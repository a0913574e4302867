"""Fixtures for the tests of the export."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from shapes import smaller_pictures


@pytest.fixture
def quick() -> Iterator[None]:
    """Runs a test with smaller pictures, where the usual ones are not what is tested."""
    with smaller_pictures():
        yield
