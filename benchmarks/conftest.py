"""The common part of the op benchmarks: devices, sizes, the measurement, one table and one JSON file.

The options --device, --sizes and --out are defined here.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from machine import RESULTS, describe, headline, write_result
from measure import Clock, Measure, Memory, warm_up_blas

from dreamfusion_fast.ops import _native

ROUNDS = {"native": 10, "twin": 3}
BACK_TO_BACK = 5
_ROWS: pytest.StashKey[list[dict[str, object]]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dreamfusion_fast")
    group.addoption("--device", choices=["cpu", "cuda"], help="default: the GPU, if there is one that works")
    group.addoption("--sizes", type=int, nargs="+", help="image sides; default: 64 and 256 on a GPU, 64 on a CPU")
    group.addoption("--out", type=Path, nargs="?", const=RESULTS, help="folder for the JSON (benchmarks/results)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []


def _device(config: pytest.Config) -> torch.device:
    return torch.device(config.getoption("--device") or ("cuda" if _native.cuda_available() else "cpu"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The native op at every size, its twin, which is slow, only at the largest."""
    sizes = metafunc.config.getoption("--sizes") or ([64, 256] if _device(metafunc.config).type == "cuda" else [64])
    if "size" in metafunc.fixturenames:
        pairs = [("native", size) for size in sizes] + [("twin", max(sizes))]
        metafunc.parametrize(("provider", "size"), pairs)
    elif "provider" in metafunc.fixturenames:
        metafunc.parametrize("provider", ["native", "twin"])


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the benchmarks run."""
    device = _device(request.config)
    warm_up_blas(device)
    return device


@pytest.fixture
def measure(benchmark, request: pytest.FixtureRequest, device: torch.device) -> Measure:  # type: ignore[no-untyped-def]
    """`measure(function, group, provider, count)`: the time and, on a GPU, the memory of a function.

    pytest-benchmark has the wall time of single calls, until the GPU is done with each. On a GPU, `gpu_ms` is the time
    of one of five calls in a row by CUDA events, so without most of the launching, and `peak_mb` what torch allocates
    at the most above what is there before the call, the result included.
    """

    def run(function: Callable[[], object], group: str, provider: str, count: int) -> None:
        def finished() -> None:
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        benchmark.group = group
        benchmark.pedantic(finished, rounds=ROUNDS[provider], warmup_rounds=2)
        row: dict[str, object] = {"group": group, "provider": provider, "count": count}
        if benchmark.stats is not None:
            row["median_ms"] = 1e3 * benchmark.stats.stats.median
        if device.type == "cuda":
            row |= {"gpu_ms": _gpu_ms(function, device, ROUNDS[provider]), "peak_mb": _peak_mb(function, device)}
        benchmark.extra_info.update(row)
        request.config.stash[_ROWS].append(row)

    return run


def _gpu_ms(function: Callable[[], object], device: torch.device, rounds: int) -> float:
    times = []
    for _ in range(max(rounds // 2, 1)):
        clock = Clock(device)
        clock.mark()
        for _ in range(BACK_TO_BACK):
            function()
        clock.mark()
        times += clock.milliseconds()
    return statistics.median(times) / BACK_TO_BACK


def _peak_mb(function: Callable[[], object], device: torch.device) -> float | None:
    memory = Memory(device)
    result = function()
    peak = memory.peak()
    del result
    return peak


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table of all ops, and the JSON file."""
    rows = config.stash[_ROWS]
    if not rows:
        return
    about = describe(_device(config))
    terminalreporter.section("ops")
    terminalreporter.write_line(headline(about))
    terminalreporter.write_line(f"{'':64}{'count':>9}{'wall ms':>10}{'GPU ms':>10}{'peak MB':>10}{'x twin':>8}")
    # A GPU's own clock where there is one: what counts against the twin is the work, not the launching.
    twins = {row["group"]: _time(row) for row in rows if row["provider"] == "twin"}
    for row in sorted(rows, key=lambda row: (str(row["group"]), str(row["provider"]))):
        numbers = "".join(f"{row[key]:10.3f}" if key in row else f"{'-':>10}" for key in ("median_ms", "gpu_ms"))
        peak = f"{row['peak_mb']:10.1f}" if "peak_mb" in row else f"{'-':>10}"
        mine, twin = _time(row), twins.get(row["group"])
        faster = f"{twin / mine:8.1f}" if row["provider"] == "native" and mine and twin else f"{'':8}"
        terminalreporter.write_line(f"{row['group']:56}{row['provider']:8}{row['count']:9}{numbers}{peak}{faster}")
    if config.getoption("--out") is not None:
        terminalreporter.write_line(str(write_result(config.getoption("--out"), "ops", about, rows)))


def _time(row: dict[str, object]) -> float | None:
    return row.get("gpu_ms", row.get("median_ms"))  # type: ignore[return-value]
