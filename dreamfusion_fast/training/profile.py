"""Where a step's time and memory go: `dreamfusion-fast generate PROMPT --profile`.

On a GPU, time is read from CUDA events that the step leaves behind, some steps later, so that measuring makes nothing
wait. A stage's time is the GPU's, from the moment the last stage's work was done: what the GPU waits for the host in
between is in it. On a CPU it is the clock's. Stages may nest, and time belongs to the innermost one, so that the stages
of a step add up to it.

Memory is asked of torch's allocator at each change of stage. That takes the host some time, so it is done in the first
steps, which are not timed, and in every fifth, and the others are timed.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from dreamfusion_fast.gpu.stages import recording

REST = "rest"
ORDER = (
    "cameras",
    "occupancy",
    "render forward",
    "encode",
    "unet",
    "encode backward",
    "guidance",
    "render backward",
    "optimiser",
)
"""The stages of a step in the order in which they are shown; any other comes after them, and the rest last."""
_TITLES = {"unet": "U-Net", "encode backward": "guidance backward", "guidance": "guidance, other"}
# Steps at one size before its steps are timed: kernels are compiled and graphs captured in the first ones.
_WARM_UP = 10
# Prime to the period of occupancy updates, so that steps with and without one are timed and weighed.
_WEIGHED_EVERY = 5
# Steps whose events may wait to be read.
_MAX_PENDING = 8


@dataclass(frozen=True)
class StageCost:
    """One row of the table.

    Attributes:
        name: as in `dreamfusion_fast.gpu.stages.stage`; "rest" is what no stage covers.
        ms: median over the timed steps that ran the stage, milliseconds.
        share: of the time of all timed steps, 0 to 1.
        steps: timed steps that ran the stage.
        peak: bytes above what was in use before the run: on a GPU torch's peak during the stage, on a CPU the process's
            resident memory at its end. None where that cannot be read.
    """

    name: str
    ms: float
    share: float
    steps: int
    peak: int | None


@dataclass(frozen=True)
class StepProfile:
    """The cost of a step.

    Attributes:
        stages: in the order of a step, the rest last.
        whole: the step.
        size: height and width of the views, pixels.
        batch: views per step.
        steady: whether the timed steps come after a warm-up; too few steps have none.
        device: name of the device.
        reserved: on a GPU, peak of what torch's allocator held in all, bytes. Captured graphs work in memory that
            counts here and not in the stages' peaks.
    """

    stages: list[StageCost]
    whole: StageCost
    size: int
    batch: int
    steady: bool
    device: str
    reserved: int | None = None

    def table(self) -> str:
        """As text."""
        kind = "steady steps" if self.steady else "steps, the first ones included"
        views = f"{self.batch} view{'s' if self.batch > 1 else ''}"
        head = f"profile: medians of {self.whole.steps} {kind}, {self.size}x{self.size}, {views}, {self.device}"
        memory = "resident GB" if self.reserved is None else "peak GB"
        rows = [f"{'stage':<20} {'ms':>9} {'share':>7} {memory:>12}"]
        for cost in [*self.stages, self.whole]:
            part = cost.steps < self.whole.steps
            peak = "-" if cost.peak is None else f"{cost.peak / 1e9:.2f}"
            title = _TITLES.get(cost.name, cost.name)
            note = f"   in {cost.steps} of {self.whole.steps} steps" if part else ""
            rows.append(f"{title:<20} {cost.ms:>9.2f} {100 * cost.share:>6.1f}% {peak:>12}{note}")
        if self.reserved is not None:
            rows.append(f"reserved by torch, graphs included: {self.reserved / 1e9:.2f} GB at most")
        return "\n".join([head, *rows])


class StepProfiler:
    """Measures steps. Made before the run: memory counts above what is in use then.

    Args:
        device: where the steps run.

    Example:
        >>> import torch
        >>> from dreamfusion_fast.gpu.stages import stage
        >>> profiler = StepProfiler(torch.device("cpu"))
        >>> for _ in range(20):
        ...     with profiler.step(size=64, batch=1), stage("unet"):
        ...         _ = torch.ones(8).sum()
        >>> profile = profiler.result()
        >>> [cost.name for cost in profile.stages], profile.whole.steps
        (['unet', 'rest'], 8)
    """

    def __init__(self, device: torch.device) -> None:
        self._meter: _CudaMeter | _CpuMeter = _CudaMeter(device) if device.type == "cuda" else _CpuMeter()
        self._records: dict[tuple[int, int], _Record] = {}
        self._pending: deque[_Timeline] = deque()
        self._now: _Timeline | None = None
        self._thread = 0

    @contextmanager
    def step(self, size: int, batch: int) -> Iterator[None]:
        """Within it, one step runs. If it raises, it does not count.

        Args:
            size: height and width of the views, pixels.
            batch: views.
        """
        record = self._records.setdefault((size, batch), _Record())
        first = record.started < _WARM_UP
        weighed = first or record.started % _WEIGHED_EVERY == 0
        # A step's time where memory is asked for is not a step's time.
        line = self._now = _Timeline(record.first if first else [] if weighed else record.steady, weighed)
        record.started += 1
        self._thread = threading.get_ident()
        self._meter.reset_peak()
        line.marks.append(self._meter.mark())
        line.names.append(REST)
        try:
            with recording(self.stage):
                yield
            self._change(line, REST)  # its mark ends the step
        finally:
            self._now = None
        for name, peak in line.peaks.items():
            record.peaks[name] = max(record.peaks[name], peak)
        self._pending.append(line)
        while self._pending and (len(self._pending) > _MAX_PENDING or self._meter.arrived(self._pending[0].marks)):
            self._read(self._pending.popleft())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """See `gpu.stages`. In a CUDA graph's capture, and on other threads than the step's: nothing."""
        line = self._now
        if line is None or threading.get_ident() != self._thread or self._meter.capturing():
            yield
            return
        outer = line.names[-1]
        self._change(line, name)
        try:
            yield
        finally:
            self._change(line, outer)

    def _change(self, line: _Timeline, name: str) -> None:
        """End the interval that goes on, and begin one of `name`."""
        ended = line.names[-1]
        line.marks.append(self._meter.mark())
        line.names.append(name)
        if line.weighed:
            peak = self._meter.read_and_reset_peak()
            if peak is not None:
                line.peaks[ended] = max(line.peaks[ended], peak)

    def _read(self, line: _Timeline) -> None:
        """Times of a step whose marks have all been passed, or waits for them."""
        times = dict.fromkeys(line.names[:-1], 0.0)
        for name, ms in zip(line.names, self._meter.intervals(line.marks), strict=False):  # the last mark begins none
            times[name] += ms
        line.into.append(times)

    def result(self) -> StepProfile | None:
        """The measurements at the size with most timed steps, or None before any step. Waits for the GPU."""
        while self._pending:
            self._read(self._pending.popleft())
        records = {kind: record for kind, record in self._records.items() if record.steady or record.first}
        if not records:
            return None
        # The later of two with as many.
        (size, batch), record = max(reversed(records.items()), key=lambda item: len(item[1].steady))
        steps = record.steady or record.first
        totals = [sum(times.values()) for times in steps]
        names = {name: None for times in steps for name in times if name != REST}
        ordered = [name for name in ORDER if name in names] + [name for name in names if name not in ORDER] + [REST]
        stages = []
        for name in ordered:
            of_stage = [times[name] for times in steps if name in times]
            share = sum(of_stage) / max(sum(totals), 1e-9)
            stages.append(StageCost(name, statistics.median(of_stage), share, len(of_stage), record.peaks.get(name)))
        peak = max(record.peaks.values()) if record.peaks else None
        whole = StageCost("whole step", statistics.median(totals), 1.0, len(steps), peak)
        return StepProfile(stages, whole, size, batch, bool(record.steady), self._meter.name, self._meter.reserved)


@dataclass
class _Record:
    """Steps of one size and batch: times by stage in milliseconds, peaks by stage in bytes."""

    started: int = 0
    first: list[dict[str, float]] = field(default_factory=list)
    steady: list[dict[str, float]] = field(default_factory=list)
    peaks: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))


@dataclass
class _Timeline:
    """One step: a mark wherever the stage changes, and the stage that begins there. Its times go `into` a list."""

    into: list[dict[str, float]]
    weighed: bool
    marks: list[Any] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    peaks: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))


class _CpuMeter:
    """Marks are times of the clock. Memory is the process's resident set, which has a present but no peak to reset."""

    name = "CPU"
    reserved: int | None = None

    def __init__(self) -> None:
        self._before = _resident_bytes()

    def mark(self) -> float:
        return time.perf_counter()

    def arrived(self, marks: list[float]) -> bool:
        return True

    def intervals(self, marks: list[float]) -> list[float]:
        return [1000.0 * (end - begin) for begin, end in pairwise(marks)]

    def capturing(self) -> bool:
        return False

    def reset_peak(self) -> None:
        pass

    def read_and_reset_peak(self) -> int | None:
        now = _resident_bytes()
        return None if now is None or self._before is None else max(now - self._before, 0)


class _CudaMeter:
    """Marks are events on the current stream. They are used again once they have been read."""

    def __init__(self, device: torch.device) -> None:
        self.name = torch.cuda.get_device_name(device)
        self._device = device
        self._before = torch.cuda.memory_allocated(device)
        self._spare: list[torch.cuda.Event] = []
        self.reserved: int | None = None

    def mark(self) -> torch.cuda.Event:
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def arrived(self, marks: list[torch.cuda.Event]) -> bool:
        return marks[-1].query()

    def intervals(self, marks: list[torch.cuda.Event]) -> list[float]:
        marks[-1].synchronize()  # returns at once where it has arrived
        times = [begin.elapsed_time(end) for begin, end in pairwise(marks)]
        self._spare += marks
        return times

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def read_and_reset_peak(self) -> int | None:
        stats = torch.cuda.memory_stats_as_nested_dict(self._device)
        self.reserved = max(self.reserved or 0, stats["reserved_bytes"]["all"]["peak"])
        self.reset_peak()
        return max(stats["allocated_bytes"]["all"]["peak"] - self._before, 0)


def _resident_bytes() -> int | None:
    """Resident memory of this process, where the system tells it as Linux does."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
