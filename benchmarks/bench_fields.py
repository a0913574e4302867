"""How well a hash grid and triplanes learn pictures of known shapes in a number of steps.

A striped torus, a green ball and a chequered block (`scene`) in 36 views of 96^2 pixels; every sixth view is left out,
and the peak signal-to-noise ratio is that of those, on white. A step takes 1024 rays of one view, on a random
background. The normals are to be looked at: `--out FOLDER` takes a picture of each field, with what it should show,
what it shows, and its normals.

    python benchmarks/bench_fields.py
    python benchmarks/bench_fields.py --fields hash_grid triplane-2-64-0.06 --steps 600 --out pictures

A triplane is named by degree, vertices a side and learning rate of its planes.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from dreamfusion_fast.export.turntable import save_png
from dreamfusion_fast.fields.encoded import EncodedField
from dreamfusion_fast.rendering import OccupancyGrid, Rays, RendererConfig, VolumeRenderer, orbit_cameras
from dreamfusion_fast.training.sections import SMALL_FIELD, OptimConfig, field_of_kind

SIZE, RAYS, SHARPNESS, OPAQUE = 96, 1024, 150.0, 60.0
FIELDS = ("hash_grid", "triplane-1-64-0.06", "triplane-2-64-0.06", "triplane-2-128-0.06", "triplane-2-64-0.03")
SHOWN = (1, 15, 29)  # views


def scene(x: Tensor) -> tuple[Tensor, Tensor]:
    """Density and colour at positions `[m, 3]`."""
    ring = torch.stack([x[:, [0, 2]].norm(dim=1) - 0.5, x[:, 1]], dim=1).norm(dim=1) - 0.15
    ball = (x - x.new_tensor([0.0, 0.35, 0.0])).norm(dim=1) - 0.25
    block = ((x - x.new_tensor([0.0, -0.35, 0.0])).abs() - x.new_tensor([0.2, 0.25, 0.2])).amax(dim=1)
    distances = torch.stack([ring, ball, block])
    stripes = 0.5 + 0.5 * torch.sin(20 * torch.atan2(x[:, 2], x[:, 0]))
    odd = (x * 10).floor().sum(dim=1) % 2 == 0
    colors = torch.stack(
        [
            torch.stack([stripes, torch.full_like(ring, 0.3), torch.full_like(ring, 0.2)], dim=1),
            x.new_tensor([0.1, 0.6, 0.2]).expand(len(x), 3),
            torch.where(odd[:, None], x.new_tensor([0.9, 0.9, 0.2]), x.new_tensor([0.1, 0.2, 0.8])),
        ]
    )
    nearest = distances.min(dim=0)
    return OPAQUE * torch.sigmoid(-SHARPNESS * nearest.values), colors[nearest.indices, torch.arange(len(x))]


class Pictures:
    """Rays, colours on black and opacities of the views."""

    @torch.no_grad()
    def __init__(self, device: torch.device) -> None:
        views = [(elevation, start) for elevation in (-20.0, 15.0, 50.0) for start in range(0, 360, 30)]
        cameras = [orbit_cameras(1, elevation_deg=elevation, start_deg=start) for elevation, start in views]
        self.rays = [camera.rays(SIZE, SIZE).to(device) for camera in cameras]
        teacher = VolumeRenderer(scene, None, RendererConfig(samples_across=192)).to(device)
        outputs = [teacher.render(rays) for rays in self.rays]
        self.colors, self.opacities = [o.color for o in outputs], [o.opacity for o in outputs]
        self.held_out = range(3, len(views), 6)
        self.seen = [view for view in range(len(views)) if view not in self.held_out]

    def on_white(self, view: int) -> Tensor:
        """Colours `[n_rays, 3]`."""
        return self.colors[view] + (1.0 - self.opacities[view])[:, None]


def make_field(name: str) -> tuple[EncodedField, dict[str, float]]:
    """The field, and the learning rate of each of its groups; the sizes are those of a run of the embedded prior."""
    kind, *numbers = name.split("-")
    config, rates = field_of_kind(kind, SMALL_FIELD), OptimConfig()
    if numbers:
        degree, resolution = int(numbers[0]), int(numbers[1])
        config = type(config)(**{**vars(config), "degree": degree, "resolution": resolution})
    field = config.build(generator=torch.Generator().manual_seed(1))
    by_kind = {group: getattr(rates, f"lr_{group}") for group in field.parameter_groups()}
    return field, by_kind | ({"planes": float(numbers[2])} if numbers else {})


def fit(field: EncodedField, rates: dict[str, float], pictures: Pictures, steps: int) -> VolumeRenderer:
    """Fit the field to the views that it may see; its renderer."""
    device = field.aabb.device
    occupancy = OccupancyGrid(resolution=64).to(device)
    renderer = VolumeRenderer(field, occupancy, RendererConfig(samples_across=128)).to(device)
    groups = [{"params": p, "peak": rates[kind]} for kind, p in field.parameter_groups().items()]
    optimizer, draws = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-15), torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * max(0.5 + 0.5 * math.cos(math.pi * step / steps), 0.05)
        occupancy.update(field, step)
        view = pictures.seen[int(torch.randint(len(pictures.seen), (1,), generator=draws))]
        chosen = torch.randint(SIZE * SIZE, (RAYS,), generator=draws).to(device)
        background = torch.rand(3, generator=draws).to(device)
        rays = Rays(pictures.rays[view].origins[chosen], pictures.rays[view].directions[chosen])
        output = renderer.render(rays, background, jitter=True, seed=step)
        wanted = pictures.colors[view][chosen] + (1.0 - pictures.opacities[view][chosen])[:, None] * background
        optimizer.zero_grad()
        (output.color - wanted).square().mean().backward()
        optimizer.step()
    return renderer


@torch.no_grad()
def psnr(renderer: VolumeRenderer, pictures: Pictures) -> float:
    """PSNR of the views that were left out, dB."""
    white = torch.ones(3, device=pictures.colors[0].device)
    shown = torch.stack([renderer.render(pictures.rays[view], white).color for view in pictures.held_out])
    wanted = torch.stack([pictures.on_white(view) for view in pictures.held_out])
    return -10.0 * math.log10((shown - wanted).square().mean().item())


@torch.no_grad()
def picture(renderer: VolumeRenderer, pictures: Pictures) -> Tensor:
    """A row for each of a few views: the picture, the render, the normals."""
    rows, white = [], torch.ones(3, device=pictures.colors[0].device)
    for view in SHOWN:
        output = renderer.render(pictures.rays[view], white, with_normals=True)
        assert output.normal is not None
        normals = 0.5 * output.normal + 0.5 * output.opacity[:, None] + (1.0 - output.opacity[:, None])
        images = [image.view(SIZE, SIZE, 3) for image in (pictures.on_white(view), output.color, normals)]
        rows.append(torch.cat(images, dim=1))
    return torch.cat(rows).clamp(0.0, 1.0).repeat_interleave(3, 0).repeat_interleave(3, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fields", nargs="+", default=list(FIELDS))
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    pictures = Pictures(torch.device(given.device))
    for name in given.fields:
        field, rates = make_field(name)
        start = time.perf_counter()
        renderer = fit(field.to(given.device), rates, pictures, given.steps)
        seconds = time.perf_counter() - start
        print(f"{name:24} {psnr(renderer, pictures):6.2f} dB {seconds:7.1f} s", flush=True)
        if given.out is not None:
            given.out.mkdir(parents=True, exist_ok=True)
            save_png(given.out / f"{name}.png", picture(renderer, pictures))


if __name__ == "__main__":
    main()
