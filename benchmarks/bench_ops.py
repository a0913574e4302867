"""Each op, native against its pure-PyTorch twin: march, composite and hash grid, forward, backward and both.

The workload of `bench_render.py`: one camera at distance 2 (azimuth and elevation 0.3 rad, 60 degrees field of view),
occupancy 128^3 holding a ball of radius 0.5, step 2 sqrt(3) / 512, jitter. Hash grids: "large", 16 x 2 features, 2^19
rows, 16 to 2048, and "small", 8 x 2, 2^15 rows, 16 to 128.

    OMP_NUM_THREADS=2 pytest benchmarks/bench_ops.py --benchmark-group-by=group --benchmark-columns=min,median,rounds
    pytest benchmarks/bench_ops.py -k "hash_grid and small" --benchmark-json=ops.json

On a machine with a GPU the same benchmarks run there, too, and at 256^2 rays as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from dreamfusion_fast import ops
from dreamfusion_fast.ops import _native
from dreamfusion_fast.rendering import orbit_cameras

RADIUS = 0.5
RESOLUTION = 128
STEP = 2 * math.sqrt(3) / 512
GRIDS = {"large": (16, 16, 2048, 19), "small": (8, 16, 128, 15)}  # levels, base, finest resolution, log2 of the rows
PLACES = [("cpu", 64)] + ([("cuda", 64), ("cuda", 256)] if _native.cuda_available() else [])

each_place = pytest.mark.parametrize(("device", "size"), PLACES)
each_provider = pytest.mark.parametrize("provider", ["native", "twin"])


@dataclass(frozen=True)
class Workload:
    """What the march of one image takes and gives."""

    march: tuple[object, ...]
    offsets: Tensor
    t: Tensor
    positions: Tensor


@cache
def workload(device: str, size: int) -> Workload:
    angle = math.degrees(0.3)
    camera = orbit_cameras(1, elevation_deg=angle, distance=2.0, fov_deg=60.0, start_deg=angle)
    rays = camera.rays(size, size).to(torch.device(device))
    aabb = torch.tensor([-1.0, -1, -1, 1, 1, 1], device=device)
    axis = (torch.arange(RESOLUTION, device=device) + 0.5) * (2 / RESOLUTION) - 1
    inside = axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2 < RADIUS**2
    bitfield = ops.occupancy_pack(inside.float(), 0.5)
    near_far = ops.ray_box(rays.origins, rays.directions, aabb)
    march = (rays.origins, rays.directions, *near_far, aabb, bitfield, RESOLUTION, STEP, True, 1)
    offsets, t, ray = ops.march(*march)
    positions = rays.origins[ray] + t[:, None] * rays.directions[ray]
    return Workload(march, offsets, t, (positions + 1) / 2)


def measure(benchmark, function: Callable[[], object], group: str, device: str, samples: int) -> None:  # type: ignore[no-untyped-def]
    """Times calls of `function` until the GPU, if that is where it works, is done with each."""

    def finished() -> None:
        function()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = group
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    benchmark.extra_info.update(samples=samples, where=where, torch=torch.__version__)
    benchmark.pedantic(finished, rounds=10, warmup_rounds=2)


def mode(function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], name: str) -> Callable[[], object]:
    """The forward, the backward, or both ("full") of a function of tensors, by random gradients of its outputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    grads = [torch.randn_like(x) for x in outputs]

    def forward() -> object:
        with torch.no_grad():
            return function(*inputs)

    def backward() -> object:
        return torch.autograd.grad(outputs, inputs, grads, retain_graph=True)

    def full() -> object:
        return torch.autograd.grad(function(*inputs), inputs, grads)

    return {"forward": forward, "backward": backward, "full": full}[name]


@each_place
@each_provider
def test_march(benchmark, provider: str, device: str, size: int) -> None:  # type: ignore[no-untyped-def]
    work = workload(device, size)
    function = ops.march if provider == "native" else ops.march_reference
    measure(benchmark, lambda: function(*work.march), f"march {device} {size}^2", device, work.t.shape[0])


@each_place
@each_provider
@pytest.mark.parametrize("name", ["forward", "backward", "full"])
def test_composite(benchmark, name: str, provider: str, device: str, size: int) -> None:  # type: ignore[no-untyped-def]
    work = workload(device, size)
    m = work.t.shape[0]
    function = ops.composite if provider == "native" else ops.composite_reference
    inputs = [torch.rand(m, device=device) * 20, torch.rand(m, 3, device=device)]
    run = mode(lambda density, values: function(density, values, work.t, STEP, work.offsets), inputs, name)
    measure(benchmark, run, f"composite {name} {device} {size}^2", device, m)


@each_place
@each_provider
@pytest.mark.parametrize("name", ["forward", "backward", "full"])
@pytest.mark.parametrize("grid", GRIDS)
def test_hash_grid(benchmark, grid: str, name: str, provider: str, device: str, size: int) -> None:  # type: ignore[no-untyped-def]
    """Gradient to the table alone, as in training without normals."""
    work = workload(device, size)
    levels = [x.to(device) for x in ops.hash_grid_layout(*GRIDS[grid])]
    table = torch.randn(int(levels[0][-1]), 2, device=device)
    function = ops.hash_grid if provider == "native" else ops.hash_grid_reference
    run = mode(lambda table: (function(work.positions, table, *levels),), [table], name)
    measure(benchmark, run, f"hash_grid {grid} {name} {device} {size}^2", device, work.t.shape[0])


@each_place
@each_provider
@pytest.mark.parametrize("grid", GRIDS)
def test_hash_grid_normals(benchmark, grid: str, provider: str, device: str, size: int) -> None:  # type: ignore[no-untyped-def]
    """The gradient to the positions, and from a loss on it the gradients to the table and to what multiplied it."""
    work = workload(device, size)
    levels = [x.to(device) for x in ops.hash_grid_layout(*GRIDS[grid])]
    table = torch.randn(int(levels[0][-1]), 2, device=device, requires_grad=True)
    m = work.t.shape[0]
    grad_output = torch.randn(m, 2 * GRIDS[grid][0], device=device, requires_grad=True)
    direction = torch.randn(m, 3, device=device)

    def native() -> object:
        normals = ops.hash_grid_position_gradient(grad_output, work.positions, table, *levels)
        return torch.autograd.grad(normals, (grad_output, table), direction)

    def twin() -> object:
        positions = work.positions.detach().requires_grad_()
        output = ops.hash_grid_reference(positions, table, *levels)
        (normals,) = torch.autograd.grad(output, positions, grad_output, create_graph=True)
        return torch.autograd.grad(normals, (grad_output, table), direction)

    run = native if provider == "native" else twin
    measure(benchmark, run, f"hash_grid {grid} normals {device} {size}^2", device, m)
