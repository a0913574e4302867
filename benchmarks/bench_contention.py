"""A training step on a CPU while other processes want the same cores, beside what it takes alone.

Each row is one kind of step by one way of waiting, measured by itself (idle) and beside one busy process per core:

- step `render`: 64^2 rays of the scene of `workload.py`, lambertian, forward and backward in the CPU core, and torch's
  fused Adam, as `bench_render.py --optimizer` does them;
- step `run`: a whole step of `dreamfusion-fast generate` on a CPU, with the embedded prior;
- waiting `package first`: as it is where dreamfusion_fast is imported before torch, which the command line does.
  `torch first`: the other order. `spinning`: as OpenMP has it by itself (GOMP_SPINCOUNT=300000). `one thread`: nothing
  waits, so what sharing the cores costs alone;
- idle, busy: the median of a step's milliseconds. ratio: busy / idle. lost: idle against that of `spinning`.

The workers are processes that take turns, idle and busy, so that whatever else the machine does meets all of them. In
idle time other processes get what a worker sleeps: on a machine with more to do, `chrt -f 1` tells what is lost.

    python benchmarks/bench_contention.py            # both steps
    python benchmarks/bench_contention.py --out      # written to benchmarks/results
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import backends
import torch
from bench_render import Step
from machine import RESULTS, describe, headline, write_result
from workload import make_scene

from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.trainer import Trainer

CPU = torch.device("cpu")
WARMUPS = 3


@dataclass(frozen=True)
class Waiting:
    """How a worker's threads wait: what it imports first, and its environment."""

    first: str = "torch"
    environment: dict[str, str] = field(default_factory=dict)


WAITINGS = {
    "package first": Waiting(first="dreamfusion_fast"),
    "torch first": Waiting(),
    "spinning": Waiting(environment={"GOMP_SPINCOUNT": "300000"}),  # what libgomp has by itself
    "one thread": Waiting(environment={"OMP_NUM_THREADS": "1"}),
}
CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass
class Row:
    """One kind of step by one way of waiting."""

    step: str
    waiting: str
    threads: int
    repeats: int
    idle_ms: float
    busy_ms: float
    ratio: float
    lost: float | None = None


def render_step(size: int) -> Callable[[], object]:
    """A step of the renderer alone, at `size^2`."""
    scene = make_scene(size, 0.5, "lambertian", CPU)
    step = Step(backends.build("native", scene, "float32", None), scene.image_gradient, optimizer=True)
    seeds = iter(range(2**31))
    return lambda: step(next(seeds))


def run_step(size: int) -> Callable[[], object]:
    """A step of a whole run, at `size^2`."""
    config = Config.for_guidance("embedded", prompt="an armchair")
    schedule = replace(config.schedule, render_size_start=size, render_size=size)
    return Trainer(replace(config, schedule=schedule, batch=config.batch_on(CPU)), CPU).step


STEPS = {"render": render_step, "run": run_step}


def serve(kind: str, size: int) -> None:
    """A worker: takes as many steps as each number on stdin says, and prints their milliseconds."""
    step = STEPS[kind](size)
    for _ in range(WARMUPS):
        step()
    print(torch.get_num_threads(), flush=True)
    for line in sys.stdin:
        marks = [time.perf_counter()]
        for _ in range(int(line)):
            step()
            marks.append(time.perf_counter())
        print(*(1e3 * (after - before) for before, after in pairwise(marks)), flush=True)


class Worker:
    """A process that does steps of one kind when asked to."""

    def __init__(self, kind: str, waiting: Waiting, size: int) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in CHOSEN} | waiting.environment
        code = f"import {waiting.first}, bench_contention; bench_contention.serve({kind!r}, {size})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parent,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.threads = int(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a worker ended; its error is above")
        return line

    def measure(self, steps: int) -> list[float]:
        """Milliseconds of each of `steps` steps."""
        print(steps, file=self._process.stdin, flush=True)
        return [float(word) for word in self._line().split()]

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def busy_processes() -> Iterator[None]:
    """One for each core, while the block runs."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    try:
        time.sleep(0.2)  # they start
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()


def measure(kind: str, waitings: Sequence[str], size: int, turns: int, repeats: int) -> list[Row]:
    """The rows of one kind of step: `turns` of `repeats` steps each, idle and busy."""
    idle: dict[str, list[float]] = {waiting: [] for waiting in waitings}
    busy: dict[str, list[float]] = {waiting: [] for waiting in waitings}
    with contextlib.ExitStack() as ending:
        workers = {}
        for waiting in waitings:
            workers[waiting] = Worker(kind, WAITINGS[waiting], size)
            ending.callback(workers[waiting].close)
        for _ in range(turns):
            for waiting, worker in workers.items():
                idle[waiting] += worker.measure(repeats)
            with busy_processes():
                for waiting, worker in workers.items():
                    busy[waiting] += worker.measure(repeats)
    rows = []
    for waiting, worker in workers.items():
        alone, beside = statistics.median(idle[waiting]), statistics.median(busy[waiting])
        rows.append(Row(kind, waiting, worker.threads, turns * repeats, alone, beside, beside / alone))
        if "spinning" in idle:
            rows[-1].lost = alone / statistics.median(idle["spinning"]) - 1
    return rows


HEADER = "step    waiting         threads      idle      busy   ratio     lost"


def line(row: Row) -> str:
    """A row as text."""
    lost = "-" if row.lost is None else f"{100 * row.lost:.1f} %"
    return f"{row.step:8}{row.waiting:14}{row.threads:9}{row.idle_ms:10.1f}{row.busy_ms:10.1f}{row.ratio:8.2f}{lost:>9}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--waiting", nargs="+", choices=WAITINGS, default=list(WAITINGS))
    parser.add_argument("--size", type=int, default=64, help="image side")
    parser.add_argument("--turns", type=int, default=10, help="of each worker, idle and busy")
    parser.add_argument("--repeats", type=int, default=4, help="steps in a turn")
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS, help="folder for the JSON (benchmarks/results)")
    args = parser.parse_args(arguments)
    about = describe(CPU)
    print(headline(about), HEADER, sep="\n", flush=True)
    rows = []
    for kind in args.steps:
        for row in measure(kind, args.waiting, args.size, args.turns, args.repeats):
            rows.append(row)
            print(line(row), flush=True)
    if args.out is not None:
        print(write_result(args.out, "contention", about, [asdict(row) for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
