"""One thread for tests whose tensors are too small to share out, and whose bits are compared."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For all tests here."""
