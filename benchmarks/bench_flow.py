"""Flow-matching models within a memory limit: time of a step and the most memory that a run takes.

The trainer is the real one, with the settings that `dreamfusion-fast generate` has for published models, one view of
64^2 per step. The models have random weights of the real architectures (`flow_architectures.py`), which are rounded or
brought to the GPU as in a run, and prompts are embedded as random numbers, as text encoders are gone by then. Per case
(a model, and its --guidance.weights):

- load s: from nothing to the first step, with what making random weights takes in place of reading files;
- ms: of a step, the mean without a wait between them, after two to warm up;
- allocated, reserved: torch's peaks over the whole case, in GB (10^9 bytes), and what was planned.

    python benchmarks/bench_flow.py                                      # all of them within 16 GB
    python benchmarks/bench_flow.py --cases flux-dev:nf4 --memory 12GB --steps 8
    python benchmarks/bench_flow.py --cases tiny-sd:plain tiny-flux:int8 --device cpu   # to try it without a GPU
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from bench_step import Row as StepRow
from bench_step import config_of, time_steps
from flow_architectures import TRANSFORMERS, RandomFlow, RandomFlowPrompts
from machine import RESULTS, describe, headline, write_result

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance import GuidanceConfig
from dreamfusion_fast.guidance.models.flow_pipelines import FLOW_MODELS
from dreamfusion_fast.training.memory_plan import capped
from dreamfusion_fast.training.trainer import Trainer

CASES = [
    "sd-3:plain",
    "sd-3.5-medium:plain",
    "sd-3.5-large:int8",
    "sd-3.5-large:float8",
    "sd-3.5-large:plain",
    "flux-dev:nf4",
    "flux-dev:plain",
]
_WARM_UP = 2


@dataclass
class Row:
    """One case; None: not measured, `note` says why."""

    model: str
    weights: str
    memory: str | None
    steps: int
    load_s: float | None = None
    ms: float | None = None
    allocated_gb: float | None = None
    reserved_gb: float | None = None
    planned_gb: float | None = None
    plan: str = ""
    note: str = ""


def make_trainer(row: Row, device: torch.device) -> Trainer:
    """The run of a case, planned and loaded."""
    config = GuidanceConfig(name="random/weights", weights=row.weights, cache=False)  # type: ignore[arg-type]
    source = RandomFlow(row.model)
    model = FLOW_MODELS[str(source.class_name("transformer"))](source, config, device)
    model.try_out()
    run = config_of(StepRow(row.model, 64, 1, "albedo", row.memory, row.steps))
    return Trainer(run, device, RandomFlowPrompts(model, config))


def fill(row: Row, device: torch.device) -> None:
    """Measure a case."""

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with capped(row.memory, device):
        start = time.perf_counter()
        trainer = make_trainer(row, device)
        row.plan = " / ".join(trainer.planner.lines(trainer.plan))
        row.planned_gb = sum(trainer.planner.parts(trainer.plan).values()) / 1e9
        time_steps(trainer, warm_up=0, steps=1)
        row.load_s = time.perf_counter() - start
        row.ms, _ = time_steps(trainer, _WARM_UP - 1, row.steps)
    if device.type == "cuda":
        row.allocated_gb = torch.cuda.max_memory_allocated() / 1e9
        row.reserved_gb = torch.cuda.max_memory_reserved() / 1e9


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write it if asked to; 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = [f"{model}:{weights}" for model in TRANSFORMERS for weights in ("plain", "int8", "float8", "nf4")]
    parser.add_argument("--cases", nargs="+", choices=cases, default=CASES, metavar="MODEL:WEIGHTS")
    parser.add_argument("--memory", default="16GB", help="the run has to fit into it")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", action="store_true", help="add the rows to a JSON file in benchmarks/results")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu runs the tiny models")
    about = describe(device)
    print("device", headline(about))
    names = ("load s", "ms", "alloc GB", "resv GB", "planned")
    print(f"{'model':15}{'weights':8}{'memory':>7}", *(f"{name:>8}" for name in names))
    rows = []
    for case in args.cases:
        model, _, weights = case.partition(":")
        row = Row(model, weights, args.memory, args.steps)
        rows.append(row)
        try:
            fill(row, device)
        except (UserError, torch.OutOfMemoryError) as error:
            row.note = " ".join(str(error).split())[:200]
        numbers = (row.load_s, row.ms, row.allocated_gb, row.reserved_gb, row.planned_gb)
        cells = "".join("        -" if x is None else f"{x:9.2f}" for x in numbers)
        print(f"{row.model:15}{row.weights:8}{row.memory:>7}{cells}  {row.note}", flush=True)
        print("   ", row.plan, flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if args.out:
        print("written:", write_result(RESULTS, "flow", about, [asdict(row) for row in rows]))
    return int(any(row.note for row in rows))


if __name__ == "__main__":
    sys.exit(main())
