"""A folder of runs, and jobs whose runs are those of fake_run.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from app_helpers import FAKE

from dreamfusion_fast.app.jobs import Jobs
from dreamfusion_fast.app.runs import Runs


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    folder = tmp_path / "runs"
    folder.mkdir()
    return Runs(folder)


@pytest.fixture
def jobs(runs: Runs) -> Iterator[Jobs]:
    jobs = Jobs(runs, FAKE)
    yield jobs
    jobs.close()
