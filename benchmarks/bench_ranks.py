"""One object by several processes beside the same by one: time of a step, memory, and whether both do the same.

The trainer is the real one, as in `bench_step.py`, started by `torchrun` with a GPU for each process, and by itself.
Printed are, of both:

- ms: of a step, the mean over the second half of the steps without a wait between them;
- allocated, reserved: torch's peaks, the largest of all processes, in GB (10^9 bytes);

and of both together: whether all parameters were equal to the bit in all processes after the last step, and the largest
relative difference of the "sds" loss from that of one process, in the first ten steps and in all. Sums in another order
round otherwise, and what is rounded otherwise drifts apart: the first ten say whether both do the same.

    python benchmarks/bench_ranks.py                                      # SD 2.1, 4 views, two GPUs
    python benchmarks/bench_ranks.py --model embedded --processes 2 --device cpu --steps 4
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from architectures import UNETS
from bench_step import Row, make_trainer
from machine import RESULTS, describe, headline, write_result

from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.ranks import Ranks, joined_ranks
from dreamfusion_fast.training.trainer import Trainer

_FIRST = 10


def trainer_of(model: str, views: int, steps: int, device: torch.device, ranks: Ranks | None) -> Trainer:
    """A run of so many views per step, of a large model with random weights or of the embedded one."""
    if model == "embedded":
        return Trainer(Config(prompt="an armchair", batch=views), device, ranks=ranks)
    return make_trainer(Row(model, 64, views, "albedo", None, steps), device, ranks)


def measured(trainer: Trainer, steps: int) -> dict[str, Any]:
    """Times, losses, memory and digests of the parameters, as one process has them."""
    device, half = trainer.device, steps // 2
    gpu = device.type == "cuda"
    losses = []

    def run(count: int) -> None:
        losses.extend(trainer.step().losses["sds"] for _ in range(count))
        if gpu:
            torch.cuda.synchronize(device)

    run(half)
    start = time.perf_counter()
    run(steps - half)
    ms = (time.perf_counter() - start) / (steps - half) * 1e3
    parameters = [p for group in trainer.scene.parameter_groups().values() for p in group]
    digests = [hashlib.sha256(p.detach().cpu().numpy().tobytes()).hexdigest() for p in parameters]
    return {
        "ms": ms,
        "losses": torch.stack(losses).tolist(),
        "parameters": digests,
        "allocated_gb": torch.cuda.max_memory_allocated(device) / 1e9 if gpu else None,
        "reserved_gb": torch.cuda.max_memory_reserved(device) / 1e9 if gpu else None,
    }


def worker(args: argparse.Namespace) -> None:
    """One process: writes what it measured into the folder `args.into`."""
    if args.processes == 1:
        device = torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device)
        found, rank = measured(trainer_of(args.model, args.views, args.steps, device, None), args.steps), 0
    else:
        with joined_ranks(args.device) as ranks:
            found = measured(trainer_of(args.model, args.views, args.steps, ranks.device, ranks), args.steps)
            rank = ranks.rank
    (Path(args.into) / f"{args.processes}-{rank}.json").write_text(json.dumps(found))


def started(args: argparse.Namespace, processes: int, folder: str) -> list[dict[str, Any]]:
    """The results of so many processes, in the order of their ranks."""
    own = [__file__, "--into", folder, "--processes", str(processes), "--model", args.model, "--device", args.device]
    own += ["--views", str(args.views), "--steps", str(args.steps)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    subprocess.run([sys.executable, *(torchrun if processes > 1 else []), *own], check=True)
    return [json.loads((Path(folder) / f"{processes}-{rank}.json").read_text()) for rank in range(processes)]


def row_of(args: argparse.Namespace, found: Sequence[dict[str, Any]], alone: dict[str, Any]) -> dict[str, Any]:
    """A row of the table."""
    differences = [abs(a - b) / abs(b) for a, b in zip(found[0]["losses"], alone["losses"], strict=True)]
    row: dict[str, Any] = {"model": args.model, "views": args.views, "steps": args.steps, "processes": len(found)}
    row |= {"ms": found[0]["ms"], "times_as_fast": alone["ms"] / found[0]["ms"]}
    row |= {
        name: None if found[0][name] is None else max(part[name] for part in found)
        for name in ("allocated_gb", "reserved_gb")
    }
    row["parameters_equal"] = all(part["parameters"] == found[0]["parameters"] for part in found)
    return row | {"loss_error_first": max(differences[:_FIRST]), "loss_error": max(differences)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write it if asked to; 1 if the processes came apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*UNETS, "embedded"], default="sd-2.1")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", action="store_true", help="write a JSON file to benchmarks/results")
    parser.add_argument("--into", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.into:
        worker(args)
        return 0
    if args.device == "cuda" and torch.cuda.device_count() < args.processes:
        parser.error(f"--processes: got {args.processes}, want at most {torch.cuda.device_count()}, a GPU for each")
    about = describe(torch.device(args.device))
    print("device", headline(about))
    with tempfile.TemporaryDirectory() as folder:
        alone = started(args, 1, folder)
        together = started(args, args.processes, folder)
    rows = [row_of(args, found, alone[0]) for found in (alone, together)]
    for row in rows:
        shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
        print(", ".join(f"{name} {value}" for name, value in shown.items()))
    if args.out:
        print("written:", write_result(RESULTS, "ranks", about, rows))
    return int(not rows[1]["parameters_equal"])


if __name__ == "__main__":
    sys.exit(main())
