"""progress.json in a run's folder: where the run is, for other processes to read while it goes on."""

from __future__ import annotations

import collections
import dataclasses
import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dreamfusion_fast.io import write_text

Stage = Literal["loading", "steps", "firm", "export", "done"]
"""loading: the diffusion model; steps: optimiser steps; firm: the last stage, `FirmConfig`; export: mesh and pictures;
done: all that is written."""

_WINDOW = 20.0  # seconds over which the rate is taken: it changes where the render size does


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        stage: what it does.
        done: parts of the stage that are done: steps, in stage firm its own, in stage export views of the turntable.
        total: parts of the stage.
        rate: parts a second; None where that is not known yet.
        began: when this stage began, seconds since 1970.
        written: when this was written, seconds since 1970.
        losses: by name, as they were read last.
    """

    stage: Stage = "loading"
    done: int = 0
    total: int = 0
    rate: float | None = None
    began: float = 0.0
    written: float = 0.0
    losses: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def left(self) -> float | None:
        """Seconds to the end of the stage at this rate; None where that is not known."""
        return (self.total - self.done) / self.rate if self.rate else None


def read_progress(path: Path) -> Progress | None:
    """Read what `ProgressFile` wrote; None where there is nothing of the kind."""
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        return Progress(**values)
    except (OSError, ValueError, TypeError):
        return None


class ProgressFile:
    """Keeps the file up to date, from any thread. A file that cannot be written never ends a run: nothing is raised.

    Args:
        path: the file; None: nothing is written.
        every: seconds between two writes at least, but for a new stage, which is written at once.
    """

    def __init__(self, path: Path | None, every: float) -> None:
        self._path, self._every = path, every
        self._now = Progress()
        self._last = 0.0
        self._seen: collections.deque[tuple[float, int]] = collections.deque()
        self._lock = threading.Lock()

    def stage(self, stage: Stage, done: int = 0, total: int = 0) -> None:
        """A stage begins, with `done` of its `total` parts done."""
        with self._lock:
            self._seen.clear()
            self._seen.append((time.monotonic(), done))
            self._now = Progress(stage, done, total, began=time.time(), losses=self._now.losses)
            self._write()

    def advance(self, done: int | None = None, losses: dict[str, float] | None = None) -> None:
        """`done` parts of the stage are done, by default one more than before."""
        with self._lock:
            self._advance(done, losses)

    def _advance(self, done: int | None, losses: dict[str, float] | None) -> None:
        now = time.monotonic()
        done = self._now.done + 1 if done is None else done
        self._now = dataclasses.replace(self._now, done=done, losses=self._now.losses if losses is None else losses)
        if now - self._last < self._every and done < self._now.total:
            return
        self._seen.append((now, done))
        while now - self._seen[0][0] > _WINDOW and len(self._seen) > 2:
            self._seen.popleft()
        began, first = self._seen[0]
        rate = (done - first) / (now - began) if now > began and done > first else None
        self._now = dataclasses.replace(self._now, rate=rate)
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        self._last = time.monotonic()
        self._now = dataclasses.replace(self._now, written=time.time())
        try:
            write_text(self._path, json.dumps(dataclasses.asdict(self._now)), durable=False)
        except OSError:
            self._path = None  # a full disk: the run itself says so
