"""How time and memory are measured: the GPU's own clock, torch's allocator, and CUDA graphs. On a CPU: the wall clock
and, on Linux, resident memory."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

MB = 2**20

Measure = Callable[[Callable[[], object], str, str, int], None]
"""The fixture `measure` of conftest.py: function, group, provider (native or twin), and how many things it works on."""


class Clock:
    """Marks points in time: CUDA events on a GPU, the wall clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._seconds: list[float] = []

    def mark(self) -> None:
        """Now, in the order of the GPU's work."""
        if self._gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._seconds.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """From each mark to the next. Waits for the GPU."""
        if self._gpu:
            self._events[-1].synchronize()
            return [a.elapsed_time(b) for a, b in zip(self._events, self._events[1:], strict=False)]
        return [1e3 * (b - a) for a, b in zip(self._seconds, self._seconds[1:], strict=False)]


class Memory:
    """Memory in use above what was in use when this object was made, in MB; None where it cannot be told."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0.0
        self.restart()
        self._before = self._now() or 0.0

    def restart(self) -> None:
        """Forget the peak so far."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            # What the allocator still holds of freed memory would hide what is needed next.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except (OSError, AttributeError):
            pass

    def now(self) -> float | None:
        """The bytes held at this moment; on a CPU None, since resident memory is too coarse for that."""
        return self._now() - self._before if self._device.type == "cuda" else None

    def peak(self) -> float | None:
        """The most since `restart`."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / MB - self._before
        most = _status_mb("VmHWM")
        return None if most is None else most - self._before

    def _now(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device) / MB
        return _status_mb("VmRSS") or 0.0


def _status_mb(key: str) -> float | None:
    """A line of Linux' /proc/self/status."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":")), None)


def warm_up_blas(device: torch.device) -> None:
    """Let cuBLAS take its workspaces (one for forward's thread, one for backward's), which torch counts and keeps.

    Otherwise the first benchmark of a process would seem to need more memory than the others.
    """
    for dtype in (torch.float32, torch.float16) if device.type == "cuda" else ():
        a = torch.ones(64, 64, device=device, dtype=dtype, requires_grad=True)
        (a @ a).sum().backward()


def captured_ms(
    step: Callable[[], None], parameters: Sequence[Tensor], device: torch.device, repeats: int
) -> tuple[float | None, str]:
    """Median milliseconds of `step` replayed as a CUDA graph, or None and why there is none.

    Args:
        step: clears the parameters' gradients (to None) and computes them again; the same work at every call.
        parameters: that get gradients. Captured, each gradient has one address, to which every replay writes anew.
        device: a CUDA device.
        repeats: replays to take the median of.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    expected = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    for parameter in parameters:
        parameter.grad = None
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        first: BaseException = error  # what broke the capture; to end it fails, too
        while first.__context__ is not None:
            first = first.__context__
        return None, f"not captured: {str(first).strip().splitlines()[0]}"
    got = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for gradient in got:
        gradient.fill_(float("nan"))
    graph.replay()
    # The same kernels on the same numbers: only the order of atomic additions may differ.
    if len(got) != len(expected) or any(
        not float((a - b).norm()) <= 1e-2 * float(b.norm()) for a, b in zip(got, expected, strict=True)
    ):
        return None, "captured, but a replay's gradients are not those of the step itself"
    times = []
    for _ in range(repeats):
        clock = Clock(device)
        clock.mark()
        graph.replay()
        clock.mark()
        times += clock.milliseconds()
    return statistics.median(times), ""
