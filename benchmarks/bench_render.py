"""Whole render, forward + backward: the native core against the pure-PyTorch twins.

The workload: one camera at distance 2 (azimuth and elevation 0.3 rad, 60 degrees field of view) in front of the box
[-1, 1]^3, occupancy 128^3 holding a ball, step 2 sqrt(3) / 512, jitter, no early stop; hash grid 16 x 2, 2^19 rows,
16 to 2048; MLP 32-64-64-4; softplus density with Magic3D's blob; the gradient of a random image; parameter gradients
cleared each step.

    python benchmarks/bench_render.py                       # what the machine has: a GPU at 256^2 or the CPU at 64^2
    python benchmarks/bench_render.py --sizes 64 128 256 512 --radius 0.5 1.0 --shading albedo lambertian --out
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import dreamfusion_fast
from dreamfusion_fast.fields import HashGridField, HashGridFieldConfig
from dreamfusion_fast.rendering import OccupancyGrid, Rays, RendererConfig, VolumeRenderer, orbit_cameras

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Measurement:
    """One row of the table. Times in milliseconds; peak is memory above the parameters, in MB."""

    backend: str
    size: int
    radius: float
    shading: str
    samples: int
    median_ms: float
    fastest_ms: float
    peak_mb: float | None


def make_rays(size: int, device: torch.device) -> Rays:
    angle = 180.0 / torch.pi * 0.3
    cameras = orbit_cameras(1, elevation_deg=angle, distance=2.0, fov_deg=60.0, start_deg=angle)
    return cameras.rays(size, size).to(device)


def make_occupancy(radius: float, device: torch.device, backend: str) -> OccupancyGrid:
    axis = (torch.arange(128) + 0.5) / 64 - 1
    inside = axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2 < radius**2
    occupancy = OccupancyGrid(resolution=128, backend=backend).to(device)
    occupancy.set_occupied(inside.to(device))
    return occupancy


def measure(
    backend: str, size: int, radius: float, shading: str, mlp_dtype: str, device: torch.device, repeats: int
) -> Measurement:
    """Median over `repeats` of forward + backward, after two warm-up steps."""
    config = HashGridFieldConfig(hidden_layers=2, bound="box", mlp_dtype=mlp_dtype, backend=backend)
    field = HashGridField(config, generator=torch.Generator().manual_seed(0)).to(device)
    renderer = VolumeRenderer(field, make_occupancy(radius, device, backend), RendererConfig(backend=backend)).to(
        device
    )
    rays = make_rays(size, device)
    image_gradient = torch.randn(len(rays), 3, generator=torch.Generator().manual_seed(1)).to(device)
    light = torch.tensor([1.0, 2.0, 3.0], device=device)
    samples = 0

    def step(seed: int) -> None:
        nonlocal samples
        field.zero_grad(set_to_none=True)
        output = renderer.render(rays, shading=shading, light=light, jitter=True, seed=seed)
        output.color.backward(image_gradient)
        samples = output.samples

    peak = peak_memory(device)
    for seed in range(2):
        step(seed)
    times = [timed(step, seed, device) for seed in range(2, 2 + repeats)]
    return Measurement(backend, size, radius, shading, samples, statistics.median(times), min(times), peak())


def timed(step: Callable[[int], None], seed: int, device: torch.device) -> float:
    """Milliseconds of one step."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step(seed)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def peak_memory(device: torch.device) -> Callable[[], float | None]:
    """Start watching; the result says how many MB the peak was above now. On a CPU: resident memory, Linux only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return lambda: (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        # What the allocator still holds from the row before would hide this row's own need.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        resident = _status_kb("VmRSS")
        return lambda: (_status_kb("VmHWM") - resident) / 1024
    except (OSError, AttributeError):
        return lambda: None


def _status_kb(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


def describe(device: torch.device) -> dict[str, str | int]:
    """What the figures were measured on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        models = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")] if cpuinfo.exists() else []
        name = models[0].split(":", 1)[1].strip() if models else platform.processor() or platform.machine()
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 0,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "dreamfusion_fast": dreamfusion_fast.__version__,
        "commit": run.stdout.strip() if run.returncode == 0 else "",
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", help="image sides; default: 256 on a GPU, 64 on a CPU")
    parser.add_argument("--radius", type=float, nargs="+", default=[0.5], help="radii of the occupied ball")
    parser.add_argument("--shading", nargs="+", default=["albedo"], choices=["albedo", "lambertian", "textureless"])
    parser.add_argument("--backends", nargs="+", default=["native", "reference"], choices=["native", "reference"])
    parser.add_argument("--mlp-dtype", help="default: float16 on a GPU, float32 on a CPU")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS, help="folder for the JSON (benchmarks/results)")
    return parser.parse_args()


def main() -> None:
    """Measure, print a table, write it as JSON if asked to."""
    args = parse()
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    mlp_dtype = args.mlp_dtype or ("float16" if device.type == "cuda" else "float32")
    machine = describe(device)
    print(", ".join(f"{key} {value}" for key, value in machine.items() if value), f", MLP {mlp_dtype}", sep="")
    print("backend      rays    r shading         samples  median ms   fastest  peak MB")
    rows = []
    for size in args.sizes or [256 if device.type == "cuda" else 64]:
        for radius in args.radius:
            for shading in args.shading:
                medians = {}
                for backend in args.backends:
                    row = measure(backend, size, radius, shading, mlp_dtype, device, args.repeats)
                    rows.append(row)
                    medians[backend] = row.median_ms
                    peak = "-" if row.peak_mb is None else f"{row.peak_mb:.0f}"
                    print(
                        f"{backend:10} {size:4}^2 {radius:4} {shading:12} {row.samples:10} {row.median_ms:10.2f} "
                        f"{row.fastest_ms:9.2f} {peak:>8}",
                        flush=True,
                    )
                if len(medians) == 2:
                    print(f"{'':10} native is {medians['reference'] / medians['native']:.1f} x as fast")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        name = "".join(c if c.isalnum() else "-" for c in str(machine["device"])).strip("-").lower()
        path = args.out / f"render-{name}.json"
        path.write_text(
            json.dumps({**machine, "mlp_dtype": mlp_dtype, "rows": [asdict(r) for r in rows]}, indent=2) + "\n"
        )
        print(f"written: {path}")


if __name__ == "__main__":
    main()
