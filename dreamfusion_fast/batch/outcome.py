"""What became of a run of a batch: a file in its folder, so that the next batch knows."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamfusion_fast.io import RunFolder, write_text

FILE, LOG, BEGUN = "outcome.json", "log.txt", "begun.txt"
"""In a run's folder: how it ended, what it logged, and while it is not done, a line for each time that it was begun."""


@dataclass(frozen=True)
class Outcome:
    """The end of a run.

    Attributes:
        error: one line; None: all came out.
        seconds: that the last attempt took.
        steps: done.
        faces: of the mesh.
        iou: how far mesh and render agree (`dreamfusion_fast.export.Agreement`), 0 to 1.
        worker: host and process.
    """

    error: str | None = None
    seconds: float = 0.0
    steps: int = 0
    faces: int = 0
    iou: float = 0.0
    worker: str = ""


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Write it to a run's folder, whole or not at all."""
    write_text(folder / FILE, json.dumps(dataclasses.asdict(outcome), indent=1) + "\n")


def read_outcome(folder: Path) -> Outcome | None:
    """What `write_outcome` wrote; None where there is nothing of the kind."""
    try:
        values: Any = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return Outcome(**values)
    except (OSError, ValueError, TypeError):
        return None


def note_begun(folder: Path, worker: str) -> None:
    """Note that this worker begins the run, so that tries can be told from calls that reached no worker."""
    with (folder / BEGUN).open("a", encoding="utf-8") as file:
        file.write(f"{worker}\n")


def times_begun(folder: Path) -> int:
    """How often `note_begun` was called since `forget_begun`."""
    try:
        return len((folder / BEGUN).read_text(encoding="utf-8").splitlines())
    except OSError:
        return 0


def forget_begun(folder: Path) -> None:
    """Set the count of `times_begun` to 0."""
    with contextlib.suppress(OSError):
        (folder / BEGUN).unlink()


def finished(folder: RunFolder) -> bool:
    """Whether a batch has brought the run to its end, and its mesh is there."""
    outcome = read_outcome(folder.path)
    return outcome is not None and outcome.error is None and folder.mesh.is_file()
