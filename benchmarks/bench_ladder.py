"""The memory ladder (docs/memory.md): each rung by itself, then steps in which memory really runs out.

The run is one of `bench_step.py`, random weights of a real architecture, planned for the whole GPU. First the trainer
is put on each rung in turn; printed are what the plan expects, torch's peaks over its steps, graphs captured anew,
and the milliseconds of a step. Then it begins again on the first rung, and torch's limit is lowered beneath it, to each
of `--limits` in turn: what it says on stderr, and the rung that it ends on.

    python benchmarks/bench_ladder.py                  # SD 2.1, four lit views of 64^2; needs a GPU, a minute
    python benchmarks/bench_ladder.py --models sd-1.5 --batch 8 --limits 6GB
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from architectures import UNETS
from bench_step import Row, make_trainer, time_steps
from machine import describe, headline

from dreamfusion_fast.errors import DoesNotFitError
from dreamfusion_fast.training.memory_plan import MemoryPlan, capped
from dreamfusion_fast.training.trainer import Trainer

# Steps in which kernels are compiled and graphs captured.
_WARM_UP = 12


def name_of(trainer: Trainer, plan: MemoryPlan) -> str:
    """A rung in words."""
    return ", ".join(plan.savings(trainer.config.batch, trainer.planner.ladder[0])) or "everything at once"


def measure(trainer: Trainer, plan: MemoryPlan, steps: int) -> tuple[float, float, float]:
    """Milliseconds of a step on a rung, and torch's peaks in GB: allocated and reserved."""
    trainer.follow(plan)
    torch.cuda.reset_peak_memory_stats()
    ms, _ = time_steps(trainer, _WARM_UP, steps)
    return ms, torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(UNETS), default=["sd-2.1"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--limits", nargs="*", default=["4GB", "3.6GB", "3GB"], help="such as 4GB, from large to small")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("memory is measured on a GPU, and there is none")
    device = torch.device("cuda", 0)
    print("device", headline(describe(device)))
    for model in args.models:
        trainer = make_trainer(Row(model, 64, args.batch, "lambertian", None, args.steps), device)
        print(f"{model}, {args.batch} views of 64^2, lit")
        print(f"{'ms':>8}{'alloc GB':>10}{'resv GB':>9}{'planned':>9}  rung")
        for plan in trainer.planner.ladder:
            ms, allocated, reserved = measure(trainer, plan, args.steps)
            planned = sum(trainer.planner.parts(plan).values()) / 1e9
            print(f"{ms:8.1f}{allocated:10.2f}{reserved:9.2f}{planned:9.2f}  {name_of(trainer, plan)}", flush=True)
        measure(trainer, trainer.planner.ladder[0], args.steps)
        for limit in args.limits:
            torch.cuda.empty_cache()
            before = trainer.steps_done
            with capped(limit, device):
                try:
                    for _ in range(args.steps):
                        trainer.step()
                except DoesNotFitError as error:
                    print(f"limit {limit}: {error}")
                    break
            done = trainer.steps_done - before
            print(f"limit {limit}: {done} steps of {args.steps}, the last one with: {name_of(trainer, trainer.plan)}")
        del trainer
    return 0


if __name__ == "__main__":
    sys.exit(main())
