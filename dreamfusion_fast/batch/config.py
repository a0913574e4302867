"""How a batch is spread over workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dreamfusion_fast.settings import Range, Settings


@dataclass(frozen=True)
class BatchConfig(Settings):
    """Where the runs of a batch go, and what each of them may use."""

    out: str = "runs"
    """Folder of all runs; each has a folder of its own in it."""
    ray: str = ""
    """Address of a Ray cluster that is there, such as auto or ray-head:6379; by default one is started here."""
    gpus_per_run: Annotated[float, Range(0, 1, open="low")] = 1.0
    """Share of a GPU that a run takes; with 0.25, four runs are on each GPU at a time. Not read without GPUs."""
    cpus_per_run: Annotated[int | None, Range(1)] = None
    """Cores, and so threads, of a run; by default half of the cores, and with GPUs an equal part of them."""
    workers: Annotated[int | None, Range(1)] = None
    """Runs at a time at most; by default as many as fit."""

    def check_together(self) -> None:
        if not self.out.strip():
            self.refuse("out", want="a folder")
