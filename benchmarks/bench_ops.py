"""Each op, native against its pure-PyTorch twin: march, composite, hash grid, MLP and occupancy grid, forward, backward
and both where there are gradients; on a GPU also group norm and gate of frozen diffusion networks. Time and, on a GPU,
memory.

The inputs are those of the scene in `workload.py` with a ball of radius 0.5. Hash grids: "large", 16 x 2 features, 2^19
rows, 16 to 2048, and "small", 8 x 2, 2^15 rows, 16 to 128. The twins run at the largest size only.

    python benchmarks/bench_ops.py                                  # a GPU at 64^2 and 256^2 rays, or the CPU at 64^2
    python benchmarks/bench_ops.py --sizes 128 -k "hash_grid and large" --benchmark-quiet
    OMP_NUM_THREADS=2 python benchmarks/bench_ops.py --device cpu --out

The options are pytest's, and those of `conftest.py`. The table at the end has them all; pytest-benchmark's own, before
it, has the spread of the wall times (--benchmark-quiet leaves it out).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from measure import Measure
from torch import Tensor
from workload import RESOLUTION, STEP, Marched, march_scene

from dreamfusion_fast import ops
from dreamfusion_fast.networks import geglu, group_norm

RADIUS = 0.5
GRIDS = {"large": (16, 16, 2048, 19), "small": (8, 16, 128, 15)}  # levels, base, finest resolution, log2 of the rows
WIDTHS = [32, 64, 64, 4]

each_mode = pytest.mark.parametrize("mode", ["forward", "backward", "full"])
each_grid = pytest.mark.parametrize("grid", GRIDS)


@cache
def marched(size: int, device: torch.device) -> Marched:
    return march_scene(size, RADIUS, device)


def choose(name: str, provider: str) -> Callable[..., Any]:
    """The op, or its twin."""
    return getattr(ops, name if provider == "native" else f"{name}_reference")


def in_mode(mode: str, function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]) -> Callable[[], object]:
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

    return {"forward": forward, "backward": backward, "full": full}[mode]


def make_grid(name: str, device: torch.device) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Level offsets and resolutions, and a random table."""
    offsets, resolutions = (x.to(device) for x in ops.hash_grid_layout(*GRIDS[name]))
    return (offsets, resolutions), torch.randn(int(offsets[-1]), 2, device=device)


def test_march(measure: Measure, device: torch.device, provider: str, size: int) -> None:
    work, march = marched(size, device), choose("march", provider)
    measure(lambda: march(*work.arguments), f"march {size}^2", provider, work.t.shape[0])


@each_mode
def test_composite(measure: Measure, device: torch.device, mode: str, provider: str, size: int) -> None:
    work, composite = marched(size, device), choose("composite", provider)
    m = work.t.shape[0]
    inputs = [torch.rand(m, device=device) * 20, torch.rand(m, 3, device=device)]
    run = in_mode(mode, lambda density, values: composite(density, values, work.t, STEP, work.offsets), inputs)
    measure(run, f"composite {mode} {size}^2", provider, m)


@each_mode
@each_grid
def test_hash_grid(measure: Measure, device: torch.device, grid: str, mode: str, provider: str, size: int) -> None:
    """Gradient to the table alone, as in training without normals."""
    work, hash_grid = marched(size, device), choose("hash_grid", provider)
    levels, table = make_grid(grid, device)
    run = in_mode(mode, lambda table: (hash_grid(work.unit, table, *levels),), [table])
    measure(run, f"hash_grid {grid} {mode} {size}^2", provider, work.t.shape[0])


@each_grid
def test_hash_grid_normals(measure: Measure, device: torch.device, grid: str, provider: str, size: int) -> None:
    """The gradient to the positions, and from a loss on it the gradients to the table and to what multiplied it."""
    work = marched(size, device)
    levels, table = make_grid(grid, device)
    table.requires_grad_()
    m = work.t.shape[0]
    grad_output = torch.randn(m, 2 * GRIDS[grid][0], device=device, requires_grad=True)
    direction = torch.randn(m, 3, device=device)

    def native() -> object:
        normals = ops.hash_grid_position_gradient(grad_output, work.unit, table, *levels)
        return torch.autograd.grad(normals, (grad_output, table), direction)

    def twin() -> object:
        unit = work.unit.detach().requires_grad_()
        output = ops.hash_grid_reference(unit, table, *levels)
        (normals,) = torch.autograd.grad(output, unit, grad_output, create_graph=True)
        return torch.autograd.grad(normals, (grad_output, table), direction)

    measure(native if provider == "native" else twin, f"hash_grid {grid} normals {size}^2", provider, m)


@each_mode
@pytest.mark.parametrize("name", ["mlp", "mlp_with_input_gradient"])
def test_mlp(measure: Measure, device: torch.device, name: str, mode: str, provider: str, size: int) -> None:
    """32-64-64-4, gradients to the input and to all parameters; on a GPU both in half precision."""
    op = choose(name, provider)
    half = device.type == "cuda"
    m = marched(size, device).t.shape[0]
    x = torch.randn(m, WIDTHS[0], device=device, dtype=torch.float16 if half else torch.float32)
    weights = [torch.randn(b, a, device=device) / a**0.5 for a, b in pairwise(WIDTHS)]
    biases = [torch.zeros(b, device=device) for b in WIDTHS[1:]]

    def function(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        layers = parameters[: len(weights)], parameters[len(weights) :]
        if provider == "native":
            outputs = op(x, *layers, activation="relu", precision="float16" if half else "float32")
        else:
            with torch.autocast(device.type, dtype=torch.float16, enabled=half):
                outputs = op(x, *layers, activation="relu")
        return outputs if isinstance(outputs, tuple) else (outputs,)

    measure(in_mode(mode, function, [x, *weights, *biases]), f"{name} {mode} {size}^2", provider, m)


@pytest.mark.parametrize("cells", ["all", "half"])
def test_occupancy_update(measure: Measure, device: torch.device, cells: str, provider: str) -> None:
    """All cells of a 128^3 grid in order, as in the warm-up, or half of them by their indices."""
    update = choose("occupancy_update", provider)
    count = RESOLUTION**3
    chosen = None if cells == "all" else torch.randperm(count, device=device)[: count // 2].sort().values
    grid = torch.rand(RESOLUTION, RESOLUTION, RESOLUTION, device=device)
    density = torch.rand(count if chosen is None else chosen.shape[0], device=device)
    measure(lambda: update(grid, chosen, density, 0.95), f"occupancy_update {cells}", provider, density.shape[0])


def test_occupancy_pack(measure: Measure, device: torch.device, provider: str) -> None:
    pack = choose("occupancy_pack", provider)
    grid = torch.rand(RESOLUTION, RESOLUTION, RESOLUTION, device=device)
    threshold = torch.tensor(0.5, device=device)
    measure(lambda: pack(grid, threshold), "occupancy_pack", provider, grid.numel())


def _needs_kernels(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("on a CPU there are no kernels of this")


@pytest.mark.parametrize("part", ["statistics", "normalise", "gradient"])
@pytest.mark.parametrize("image", [(1, 128, 512, 512), (2, 320, 64, 64)], ids=["autoencoder", "unet"])
def test_group_norm(measure: Measure, device: torch.device, image: tuple[int, ...], part: str, provider: str) -> None:
    """A layer of Stable Diffusion's, with SiLU, in half precision. The twin has no parts: it runs whole, or back."""
    _needs_kernels(device)
    x, grad = (torch.randn(image, device=device).half().to(memory_format=torch.channels_last) for _ in range(2))
    weight, bias = (torch.randn(image[1], device=device).half() for _ in range(2))
    norm = group_norm.GroupNorm(weight, bias, 32, 1e-6)
    found = group_norm.measure(norm, x)
    run: Callable[[], object]
    if provider == "native":
        parts: dict[str, Callable[[], object]] = {
            "statistics": lambda: group_norm.measure(norm, x),
            "normalise": found.normalised,
            "gradient": lambda: found.input_gradient(grad),
        }
        run = parts[part]
    else:
        mode = "backward" if part == "gradient" else "forward"
        run = in_mode(mode, lambda x: (group_norm.group_norm_reference(norm, x),), [x])
    measure(run, f"group_norm {part} {'x'.join(map(str, image))}", provider, x.numel() // image[1])


def test_geglu(measure: Measure, device: torch.device, provider: str) -> None:
    """The longest of SD 1.5's, of a guided pair, in half precision."""
    _needs_kernels(device)
    x = torch.randn(8192, 2 * 1280, device=device).half()
    op = geglu.geglu if provider == "native" else geglu.geglu_reference
    measure(lambda: op(x), "geglu", provider, x.shape[0])


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
