"""Both suites in one go: `ops-<device>.json` and `render-<device>.json`.

    python benchmarks/run.py                        # into benchmarks/results
    python benchmarks/run.py --set quick --out out  # a few rows, elsewhere

A GPU gets every row of the peers' figures, a CPU the quick set, unless told otherwise.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from bench_render import SETS
from machine import RESULTS

HERE = Path(__file__).parent


def main() -> int:
    """Run the suites one after the other, each in a process of its own. 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--set", choices=SETS, help="rows of the whole render; default: issue on a GPU, quick on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON (benchmarks/results)")
    args = parser.parse_args()
    rows = args.set or ("issue" if args.device == "cuda" else "quick")
    where = ["--device", args.device, "--out", str(args.out)]
    ops = [str(HERE / "bench_ops.py"), "-q", "--benchmark-quiet", *where]
    render = [str(HERE / "bench_render.py"), "--set", rows, *where]
    codes = []
    for command in (ops, render):
        start = time.perf_counter()
        codes.append(subprocess.run([sys.executable, *command], check=False).returncode)
        print(f"-- {time.perf_counter() - start:.0f} s\n", flush=True)
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
