"""A training step through nerfacc's names: the drop-in, and nerfacc itself where it is installed.

The rays and the ball are those of `workload.py`; the field is a cheap function of the position, so that the figures are
those of the functions that are called, not of a field. Per row, milliseconds, each the median over the repeats:

- sampling: `OccGridEstimator.sampling`, stratified, pruned by `sigma_fn` with a threshold of 0.01, as in threestudio;
- forward: `render_weight_from_density`, and sums of opacity, depth, colour and the depths' variance;
- backward: from the colours and the opacity to density and colour of each sample;
- step: these three together;
- update: of the grid after the warm-up, which a run asks for in each 16th step.

    python benchmarks/bench_nerfacc.py                      # 64^2, 128^2 and 256^2 rays
    python benchmarks/bench_nerfacc.py --sizes 512 --radius 1.0 --out
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from machine import RESULTS, describe, headline, write_result
from measure import Clock
from torch import Tensor
from workload import AABB, RESOLUTION, STEP, ball, camera_rays

PARTS = ("sampling", "forward", "backward")
WARMUPS = 3


def modules(device: torch.device) -> dict[str, ModuleType]:
    """The modules that answer to nerfacc's names, by the name of a row."""
    found = {"drop-in": importlib.import_module("dreamfusion_fast.integrations.nerfacc")}
    try:
        theirs = importlib.import_module("nerfacc")
    except ImportError as error:
        print(f"nerfacc has no rows: {error}")
        return found
    if device.type != "cuda":
        print("nerfacc has no rows: it runs on a GPU only")
        return found
    return found | {f"nerfacc {theirs.__version__}": theirs}


class Step:
    """One step's calls, part by part."""

    def __init__(self, nerfacc: ModuleType, size: int, radius: float, device: torch.device) -> None:
        rays = camera_rays(size, device)
        self._nerfacc, self._origins, self._directions = nerfacc, rays.origins, rays.directions
        self._radius = radius
        self._estimator = nerfacc.OccGridEstimator(list(AABB), resolution=RESOLUTION, levels=1).to(device)
        self._estimator.binaries = ball(radius, device)[None]
        self._estimator.occs.fill_(1.0)
        self._gradient = torch.rand(len(rays), 4, device=device)

    def density(self, positions: Tensor) -> Tensor:
        """A soft ball, `[m]`."""
        return 20.0 * torch.sigmoid(40.0 * (self._radius - positions.norm(dim=-1)))

    def update(self, clock: Clock) -> None:
        """Marks the beginning and the end of an update."""
        clock.mark()
        self._estimator.update_every_n_steps(256, lambda x: self.density(x)[:, None] * STEP)
        clock.mark()

    def run(self, clock: Clock) -> int:
        """Marks the beginning and the end of each part; returns how many samples there were."""
        nerfacc, origins, directions = self._nerfacc, self._origins, self._directions
        n_rays = origins.shape[0]

        def middles(t_starts: Tensor, t_ends: Tensor, ray_indices: Tensor) -> Tensor:
            return origins[ray_indices] + 0.5 * (t_starts + t_ends)[:, None] * directions[ray_indices]

        clock.mark()
        ray_indices, t_starts, t_ends = self._estimator.sampling(
            origins,
            directions,
            sigma_fn=lambda a, b, rays: self.density(middles(a, b, rays)),
            render_step_size=STEP,
            alpha_thre=0.01,
            stratified=True,
        )
        positions = middles(t_starts, t_ends, ray_indices)
        density, color = self.density(positions).requires_grad_(), positions.sigmoid().requires_grad_()
        clock.mark()
        weights, _, _ = nerfacc.render_weight_from_density(
            t_starts, t_ends, density, ray_indices=ray_indices, n_rays=n_rays
        )
        t = 0.5 * (t_starts + t_ends)[:, None]
        opacity = nerfacc.accumulate_along_rays(weights, None, ray_indices, n_rays)
        depth = nerfacc.accumulate_along_rays(weights, t, ray_indices, n_rays)
        image = nerfacc.accumulate_along_rays(weights, color, ray_indices, n_rays)
        nerfacc.accumulate_along_rays(weights, (t - depth[ray_indices]) ** 2, ray_indices, n_rays)
        clock.mark()
        torch.cat([image, opacity], dim=1).backward(self._gradient)
        clock.mark()
        return t_starts.shape[0]


def measured(name: str, module: ModuleType, size: int, radius: float, repeats: int, device: torch.device) -> dict:
    """A row."""
    step, samples, clock = Step(module, size, radius, device), 0, Clock(device)
    for _ in range(WARMUPS):
        step.update(clock)
        samples = step.run(clock)
    times, updates = [], []
    for _ in range(repeats):
        clock = Clock(device)
        step.run(clock)
        times.append(clock.milliseconds())
    for _ in range(repeats):
        clock = Clock(device)
        step.update(clock)
        updates += clock.milliseconds()
    parts = {part: statistics.median(column) for part, column in zip(PARTS, zip(*times, strict=True), strict=True)}
    parts |= {"step": statistics.median(map(sum, times)), "update": statistics.median(updates)}
    return {"module": name, "size": size, "radius": radius, "samples": samples, **parts}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--radius", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS, help="folder for the result")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    about = describe(device)
    print(headline(about))
    rows = []
    for size in options.sizes:
        for name, module in modules(device).items():
            rows.append(measured(name, module, size, options.radius, options.repeats, device))
            figures = "  ".join(f"{part} {rows[-1][part]:.2f}" for part in (*PARTS, "step", "update"))
            print(f"{name:16} {size:4}^2 {rows[-1]['samples']:9} samples, ms: {figures}")
    if options.out is not None:
        print(write_result(options.out, "nerfacc", about, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
