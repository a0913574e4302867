"""How far exported meshes show what the renders show, over 24 prompts.

    python benchmarks/bench_mesh.py out/meshes --generate    # make the runs that are not there, then measure all
    python benchmarks/bench_mesh.py out/meshes --out         # measure those that are there, and write the JSON

A row is a prompt: intersection over union of the silhouettes of mesh and render in 32 views of 256^2, share of the
render's silhouette that the mesh covers, mean difference of colours (`export.agreement`), and seconds of the export
without a video. The prompts go over all categories that the embedded prior knows; most have something thin.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, describe, write_result

from dreamfusion_fast import Generator
from dreamfusion_fast.training.config import Config

PROMPTS = (
    *("an armchair", "a wooden chair", "a lamp", "a cat", "a red car", "a bed", "a bicycle", "a bookcase"),
    *("a grand piano", "a mug", "a sofa", "a teddy bear", "a toaster", "a violin", "a table", "a potted cactus"),
    *("a street lamp", "a palm tree", "a bar stool", "a cocktail glass", "a motorcycle", "an office chair"),
    *("a horse", "a desk"),
)


def folder_of(runs: Path, prompt: str) -> Path:
    """Where the run of a prompt is."""
    return runs / prompt.replace(" ", "_")


def measure(folder: Path, device: str) -> dict[str, Any]:
    """Export a finished run again, elsewhere, and compare."""
    config = Config.load(folder / "config.yaml")
    config = dataclasses.replace(config, device=device, export=dataclasses.replace(config.export, turntable_frames=0))
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        mesh = Generator.resume(folder, config).export(out)
        seconds = time.perf_counter() - start
    a = mesh.agreement
    return {
        "prompt": config.prompt,
        "steps": config.steps,
        "batch": config.batch,
        "iou": round(a.iou, 4),
        "covered": round(a.covered, 4),
        "color": round(a.color, 4),
        "faces": mesh.faces,
        "export_s": round(seconds, 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. 1 if a run is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder with a run of each prompt")
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS), help="other prompts than the 24")
    parser.add_argument("--generate", action="store_true", help="make runs that are not there, with default settings")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS, help="folder for a JSON (benchmarks/results)")
    args = parser.parse_args(argv)
    missing = [prompt for prompt in args.prompts if not folder_of(args.runs, prompt).is_dir()]
    if missing and not args.generate:
        print(f"{args.runs} has no run of {', '.join(missing)}; --generate makes them", file=sys.stderr)
        return 1
    for prompt in missing:
        print(f"generating {prompt}", file=sys.stderr, flush=True)
        Generator(prompt, out=str(folder_of(args.runs, prompt)), device=args.device).run()
    rows = []
    print(f"{'prompt':18} {'IoU':>6} {'covered':>8} {'colour':>7} {'faces':>7} {'export, s':>10}")
    for prompt in args.prompts:
        row = measure(folder_of(args.runs, prompt), args.device)
        rows.append(row)
        print(
            f"{prompt:18} {row['iou']:6.3f} {row['covered']:8.3f} {row['color']:7.3f} {row['faces']:7} "
            f"{row['export_s']:10.1f}",
            flush=True,
        )
    means = {name: statistics.mean(row[name] for row in rows) for name in ("iou", "covered", "color")}
    print(f"{'mean':18} {means['iou']:6.3f} {means['covered']:8.3f} {means['color']:7.3f}")
    if args.out is not None:
        print(write_result(args.out, "mesh", describe(torch.device(args.device)), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
