"""Whole render, forward and backward: the native core with a hash grid and with a triplane, its pure-PyTorch twins, and
peers where they are installed.

The scene is that of `workload.py`. Each row is one image size, ball radius and shading; lambertian and textureless
compute normals, analytic ones in our backends. Per row:

- samples: how many the render took;
- forward, backward, full: milliseconds, each the median over the repeats (12) after 6 warm-up steps, by CUDA events on
  a GPU. Parameter gradients are cleared before each step, and each step begins with an idle GPU;
- graph: the full step replayed as a CUDA graph, for the sizes of --captured, after a look at its gradients;
- peak MB: what torch had allocated at the worst moment above what was there before the first render (parameters, rays,
  grid, the image's gradient), in forward as it is, in backward less the bytes of the parameters' gradients, of one step
  of its own. with grads: the same without that subtraction, as the peers' figures are defined;
- bytes: held between forward and backward, per sample (the output image included).

    python benchmarks/bench_render.py                       # --set quick
    python benchmarks/bench_render.py --set issue --out     # every row, written to benchmarks/results
    python benchmarks/bench_render.py --set pruned          # a fitted object, early stop 1e-4, alpha threshold 0.01
    python benchmarks/bench_render.py --sizes 64 512 --radius 0.5 1.0 --shading albedo lambertian --backends native
    python benchmarks/bench_render.py --sizes 128 --optimizer --captured 128   # the step ends with fused Adam

On a CPU times are wall times, and memory is resident memory (Linux only).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import backends
import torch
from machine import RESULTS, describe, headline, write_result
from measure import MB, Clock, Memory, captured_ms, warm_up_blas
from workload import SHADINGS, make_scene

WARMUPS = 6  # small renders run as graphs of the renderer's own from the fifth on


@dataclass(frozen=True)
class Case:
    """A case to measure: a row of the table, before it has figures."""

    backend: str
    size: int
    radius: float
    shading: str
    repeats: int = 12
    pruned: bool = False


@dataclass
class Row:
    """One row of the table. Times in ms, memory in units of 2^20 bytes; None: not measured, `note` says why."""

    backend: str
    size: int
    radius: float
    shading: str
    repeats: int
    pruned: bool
    mlp_dtype: str
    optimizer: bool
    memory_budget: int | None
    samples: int | None = None
    forward_ms: float | None = None
    backward_ms: float | None = None
    full_ms: float | None = None
    captured_ms: float | None = None
    peak_mb: float | None = None
    peak_with_gradients_mb: float | None = None
    held_mb: float | None = None
    held_bytes_per_sample: float | None = None
    left_mb: float | None = None
    """Still allocated when everything of this row is gone: what a later row does not show."""
    failed: bool = False
    note: str = ""


def issue_set() -> list[Case]:
    """Every workload the peers have figures for, 1024^2 on top, and the twins once."""
    rows = [(64, 0.5), (128, 0.5), (256, 0.5), (512, 0.5), (64, 1.0), (256, 1.0)]
    cases = [
        Case(backend, size, radius, shading)
        for backend in ("native", "triplane", *backends.PEERS)
        for shading in SHADINGS[:2]
        for size, radius in rows
    ]
    cases += [Case("reference", 256, 0.5, shading, 3) for shading in SHADINGS[:2]]
    return [*cases, Case("native", 1024, 1.0, "lambertian", 3)]


def quick_set() -> list[Case]:
    """Where things stand, in seconds, on a CPU, too."""
    return [Case(backend, 64, 0.5, shading, 5) for backend in backends.OURS for shading in SHADINGS[:2]]


def pruned_set() -> list[Case]:
    """A fitted object, rendered with pruning."""
    return [
        Case(backend, size, 0.5, shading, pruned=True)
        for backend in ("native", *backends.PEERS)
        for shading in SHADINGS[:2]
        for size in (256, 512)
    ]


SETS = {"issue": issue_set, "quick": quick_set, "pruned": pruned_set}


class Step:
    """One training step without guidance: clear the gradients, render, go backward, and let Adam step if asked to."""

    def __init__(self, renderer: backends.Renderer, image_gradient: torch.Tensor, optimizer: bool) -> None:
        self.parameters = renderer.parameters()
        self._renderer, self._image_gradient = renderer, image_gradient
        self._adam: torch.optim.Adam | None = None
        if optimizer:
            # Learning rate 0: the same work, and every step sees the same field.
            gpu = image_gradient.device.type == "cuda"
            self._adam = torch.optim.Adam(self.parameters, lr=0.0, fused=True, capturable=gpu)
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)
            self._adam.step()  # allocates its two moments, which are no part of a render's memory
            self.clear()

    def clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def forward(self, seed: int) -> tuple[torch.Tensor, int | torch.Tensor]:
        """Colour, and how many samples."""
        self.clear()
        return self._renderer.render(seed)

    def backward(self, color: torch.Tensor) -> None:
        color.backward(self._image_gradient)

    def finish(self) -> None:
        if self._adam is not None:
            self._adam.step()

    def __call__(self, seed: int) -> None:
        color, _ = self.forward(seed)
        self.backward(color)
        self.finish()

    def gradient_mb(self) -> float:
        """Size of the parameters' gradients."""
        grads = [parameter.grad for parameter in self.parameters]
        return sum(grad.numel() * grad.element_size() for grad in grads if grad is not None) / MB


def fill(row: Row, device: torch.device, captured: bool) -> None:
    """Measure a row. Raises UnavailableError without a peer's package, and what the renderer raises."""
    scene = make_scene(row.size, row.radius, row.shading, device, row.pruned)
    renderer = backends.build(row.backend, scene, row.mlp_dtype, row.memory_budget)
    step = Step(renderer, scene.image_gradient, row.optimizer)
    memory = Memory(device)  # from before the first render, so that a workspace kept between steps counts
    for seed in range(WARMUPS - 1):
        step(seed)
    measure_memory(row, step, memory, seed=WARMUPS - 1)
    times = []
    for seed in range(WARMUPS, WARMUPS + row.repeats):
        clock = Clock(device)
        clock.mark()
        color, _ = step.forward(seed)
        clock.mark()
        step.backward(color)
        clock.mark()
        step.finish()
        clock.mark()
        del color
        times.append(clock.milliseconds())
    row.forward_ms = statistics.median(forward for forward, _, _ in times)
    row.backward_ms = statistics.median(backward for _, backward, _ in times)
    row.full_ms = statistics.median(sum(parts) for parts in times)
    if captured:
        row.note = renderer.not_capturable
        if not row.note:
            row.captured_ms, row.note = captured_ms(lambda: step(0), step.parameters, device, row.repeats)


def measure_memory(row: Row, step: Step, memory: Memory, seed: int) -> None:
    """One step, watched; it is the last of the warm-up."""
    step.clear()
    memory.restart()
    color, samples = step.forward(seed)
    forward_peak, row.held_mb = memory.peak(), memory.now()
    row.samples = int(samples)
    memory.restart()
    step.backward(color)
    backward_peak = memory.peak()
    if forward_peak is not None and backward_peak is not None:
        row.peak_with_gradients_mb = max(forward_peak, backward_peak)
        row.peak_mb = max(forward_peak, backward_peak - step.gradient_mb())
    if row.held_mb is not None and row.samples:
        row.held_bytes_per_sample = row.held_mb * MB / row.samples
    step.finish()


def measure(cases: Sequence[Case], args: argparse.Namespace) -> Iterator[Row]:
    """The rows, one by one. What fails or is not installed becomes a row that says so."""
    device = torch.device(args.device)
    warm_up_blas(device)
    missing: set[str] = set()
    for case in cases:
        if case.backend in missing:
            continue
        row = Row(**asdict(case), mlp_dtype=args.mlp_dtype, optimizer=args.optimizer, memory_budget=args.memory_budget)
        if args.repeats:
            row.repeats = args.repeats
        left = Memory(device)
        try:
            fill(row, device, captured=device.type == "cuda" and row.size in args.captured)
        except backends.UnavailableError as error:
            missing.add(case.backend)
            print(f"{case.backend}: no rows, {error}", flush=True)
            continue
        except RuntimeError as error:  # out of memory, too; the other rows are still worth having
            row.failed, row.note = True, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        gc.collect()
        row.left_mb = left.now()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        yield row


HEADER = (
    "backend         rays    r shading         samples  forward backward     full    graph"
    "   peak MB  with grads    bytes"
)


def line(row: Row) -> str:
    """A row as text."""

    def number(value: float | None, width: int, digits: int) -> str:
        return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"

    times = "".join(number(x, 9, 2) for x in (row.forward_ms, row.backward_ms, row.full_ms, row.captured_ms))
    held = number(row.held_bytes_per_sample, 9, 1)
    text = (
        f"{row.backend:12} {row.size:5}^2 {row.radius:4} {row.shading:12} {number(row.samples, 10, 0)}{times}"
        f"{number(row.peak_mb, 10, 1)}{number(row.peak_with_gradients_mb, 12, 1)}{held}"
    )
    if row.left_mb is not None and row.left_mb > 1:
        text += f"\n{'':13}{row.left_mb:.1f} MB stay allocated"
    return text + (f"\n{'':13}{row.note}" if row.note else "")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--set", choices=SETS, help="named rows, in place of --sizes, --radius and --shading")
    parser.add_argument("--sizes", type=int, nargs="+", help="image sides")
    parser.add_argument("--radius", type=float, nargs="+", default=[0.5], help="radii of the occupied ball")
    parser.add_argument("--shading", nargs="+", default=["albedo"], choices=SHADINGS)
    parser.add_argument("--backends", nargs="+", choices=backends.NAMES, help="default: ours, or the set's")
    parser.add_argument("--pruned", action="store_true", help="fit the field first, and drop samples that hardly count")
    parser.add_argument("--mlp-dtype", help="default: float16 on a GPU, float32 on a CPU")
    parser.add_argument("--memory-budget", type=int, help="bytes, RendererConfig.memory_budget; default: its own")
    parser.add_argument("--optimizer", action="store_true", help="end each step with fused Adam, as part of full")
    parser.add_argument("--captured", type=int, nargs="*", default=[64, 128], help="sizes to capture in a CUDA graph")
    parser.add_argument("--repeats", type=int, help="default: 12, fewer in some rows of a set")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS, help="folder for the JSON (benchmarks/results)")
    args = parser.parse_args(arguments)
    if args.set and args.sizes:
        parser.error("--sizes: not with --set, which has its own")
    args.mlp_dtype = args.mlp_dtype or ("float16" if torch.device(args.device).type == "cuda" else "float32")
    return args


def choose(args: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for."""
    if args.sizes:
        return [
            Case(backend, size, radius, shading, pruned=args.pruned)
            for size in args.sizes
            for radius in args.radius
            for shading in args.shading
            for backend in args.backends or backends.OURS
        ]
    return [case for case in SETS[args.set or "quick"]() if case.backend in (args.backends or backends.NAMES)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table row by row, write it as JSON if asked to. 1 if a row of our own failed."""
    args = parse(arguments)
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    about = describe(device)
    print(headline(about), HEADER, sep="\n", flush=True)
    rows = []
    for row in measure(choose(args), args):
        rows.append(row)
        print(line(row), flush=True)
    if args.out is not None:
        print(
            write_result(args.out, "render-adam" if args.optimizer else "render", about, [asdict(row) for row in rows])
        )
    return int(any(row.failed for row in rows if row.backend in (*backends.OURS, "drop-in")))


if __name__ == "__main__":
    sys.exit(main())
