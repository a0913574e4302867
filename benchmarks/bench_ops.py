"""Each op, native against its pure-PyTorch twin: those of radiance fields, forward, backward and both where there are
gradients, and those over buffers of a tile; on a GPU also group norm and gate of frozen diffusion networks, on a CPU
their dense layers. Time and, on a GPU, memory.

The inputs are those of the scene in `workload.py` with a ball of radius 0.5, of which a tile holds all samples. Hash
grids: "large", 16 x 2 features, 2^19 rows, 16 to 2048, and "small", 8 x 2, 2^15 rows, 16 to 128. Triplanes: 128 x 128
x 16, read by linear and by quadratic splines. The twins run at the largest size only. `-k` finds an op by its name
(`tests/test_every_op.py` sees to it).

    python benchmarks/bench_ops.py                                  # a GPU at 64^2 and 256^2 rays, or the CPU at 64^2
    python benchmarks/bench_ops.py --sizes 128 -k "hash_grid and large" --benchmark-quiet
    OMP_NUM_THREADS=2 python benchmarks/bench_ops.py --device cpu --out

The options are pytest's, and those of `conftest.py`. The table at the end has them all; pytest-benchmark's own, before
it, has the spread of the wall times (--benchmark-quiet leaves it out).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from measure import Measure
from torch import Tensor
from workload import AABB, LIGHT, RESOLUTION, STEP, Marched, march_scene

from dreamfusion_fast import ops
from dreamfusion_fast.networks import dense, geglu, group_norm, softmax
from dreamfusion_fast.ops.hash_grid_placement import hash_grid_placements
from dreamfusion_fast.ops.march_morton import morton_cells
from dreamfusion_fast.ops.occupancy import mark_order
from dreamfusion_fast.ops.ray_box import native_ray_box
from dreamfusion_fast.ops.tiles import hash_grid as hash_grid_tile
from dreamfusion_fast.ops.tiles import march as march_tile
from dreamfusion_fast.ops.tiles import mlp as mlp_tile
from dreamfusion_fast.ops.tiles import ray_sums as ray_sums_tile
from dreamfusion_fast.ops.tiles import triplane as triplane_tile
from dreamfusion_fast.rendering import cone_distances

RADIUS = 0.5
GRIDS = {  # levels, base, finest resolution, log2 of the rows
    "large": (16, 16, 2048, 19),
    "small": (8, 16, 128, 15),
    "placed": (16, 16, 2048, 19),  # the large one, with vertices where other libraries have them
}
WIDTHS = [32, 64, 64, 4]

PLANES = (1, 3, 128, 128, 16)

each_mode = pytest.mark.parametrize("mode", ["forward", "backward", "full"])
each_grid = pytest.mark.parametrize("grid", GRIDS)
each_degree = pytest.mark.parametrize("degree", [1, 2], ids=["linear", "quadratic"])


@cache
def marched(size: int, device: torch.device) -> Marched:
    return march_scene(size, RADIUS, device)


def choose(name: str, provider: str, module: object = ops) -> Callable[..., Any]:
    """The op, or its twin."""
    return getattr(module, name if provider == "native" else f"{name}_reference")


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


def make_grid(name: str, device: torch.device) -> tuple[tuple[Any, ...], Tensor]:
    """Level offsets, resolutions, whether smoothstep, and placements; and a random table."""
    offsets, resolutions = ops.hash_grid_layout(*GRIDS[name])
    placements = None
    if name == "placed":
        sizes = resolutions.tolist()
        placements = hash_grid_placements(sizes, [size + 1 for size in sizes], 0.5).to(device)
    levels = (offsets.to(device), resolutions.to(device), False, placements)
    return levels, torch.randn(int(offsets[-1]), 2, device=device)


@pytest.mark.parametrize("name", ["ray_box", "native_ray_box"])
def test_ray_box(measure: Measure, device: torch.device, name: str, provider: str, size: int) -> None:
    origins, directions, _, _, aabb, *_ = marched(size, device).arguments
    run = native_ray_box if name == "native_ray_box" and provider == "native" else choose("ray_box", provider)
    measure(lambda: run(origins, directions, aabb), f"{name} {size}^2", provider, size * size)


@pytest.mark.parametrize("name", ["march", "march_lattice"])
def test_march(measure: Measure, device: torch.device, name: str, provider: str, size: int) -> None:
    work, march = marched(size, device), choose(name, provider)
    *rays, step, jitter, seed = work.arguments
    steps = step if name == "march" else cone_distances(0.5, 4.0, STEP, 1.0, 1 / 256, device=device)
    measure(lambda: march(*rays, steps, jitter, seed), f"{name} {size}^2", provider, work.t.shape[0])


@pytest.mark.parametrize("kind", ["equal", "growing", "cells"])
def test_traverse(measure: Measure, device: torch.device, kind: str, provider: str, size: int) -> None:
    work, traverse = marched(size, device), choose("traverse", provider)
    origins, directions, t_near, t_far, aabb, bitfield, resolution, *_ = work.arguments
    occupied = ops.occupancy_unpack(bitfield, resolution)[None]
    steps = {"equal": (STEP, 0.0), "growing": (STEP, 1 / 256), "cells": (0.0, 0.0)}[kind]
    run = partial(traverse, origins, directions, t_near, t_far, aabb[None], occupied, *steps)
    measure(run, f"traverse {kind} {size}^2", provider, run()[1].shape[0])


@pytest.mark.parametrize("name", ["march_morton", "march_morton_rows"])
def test_march_morton(measure: Measure, device: torch.device, name: str, provider: str, size: int) -> None:
    """As in training, and as in a picture, which takes eight samples of each ray at a time."""
    work, march = marched(size, device), choose(name, provider)
    origins, directions, t_near, t_far, _, bitfield, resolution, *_ = work.arguments
    grid = ops.occupancy_unpack(bitfield, resolution).flatten()
    cells = morton_cells(torch.arange(grid.numel(), device=device))
    order = (cells[:, 0] * resolution + cells[:, 1]) * resolution + cells[:, 2]
    in_order = grid[order].float().view(resolution, resolution, resolution)
    bits = mark_order(ops.occupancy_pack(in_order, 0.5), "morton")
    limit = 1024 if name == "march_morton" else 8
    rays = (origins, directions, t_near, t_far, torch.zeros_like(t_near))
    run = partial(march, *rays, bits, resolution, 1, 1.0, STEP, 10 * STEP, 0.0, limit)
    measure(run, f"{name} {size}^2", provider, work.t.shape[0])


@each_mode
def test_composite(measure: Measure, device: torch.device, mode: str, provider: str, size: int) -> None:
    work, composite = marched(size, device), choose("composite", provider)
    m = work.t.shape[0]
    inputs = [torch.rand(m, device=device) * 20, torch.rand(m, 3, device=device)]
    run = in_mode(mode, lambda density, values: composite(density, values, work.t, STEP, work.offsets), inputs)
    measure(run, f"composite {mode} {size}^2", provider, m)


@each_mode
def test_composite_alpha(measure: Measure, device: torch.device, mode: str, provider: str, size: int) -> None:
    work, composite_alpha = marched(size, device), choose("composite_alpha", provider)
    m = work.t.shape[0]
    inputs = [torch.rand(m, device=device) * 0.5, torch.rand(m, 3, device=device)]
    run = in_mode(mode, lambda alpha, values: composite_alpha(alpha, values, work.t, work.offsets), inputs)
    measure(run, f"composite_alpha {mode} {size}^2", provider, m)


@each_mode
@pytest.mark.parametrize("name", ["weights_from_density", "weights_from_alpha"])
def test_weights(measure: Measure, device: torch.device, name: str, mode: str, provider: str, size: int) -> None:
    work, weights = marched(size, device), choose(name, provider)
    step = (STEP,) if name == "weights_from_density" else ()
    inputs = [torch.rand(work.t.shape[0], device=device) * (20 if step else 0.5)]
    run = in_mode(mode, lambda absorbing: weights(absorbing, *step, work.offsets), inputs)
    measure(run, f"{name} {mode} {size}^2", provider, work.t.shape[0])


@each_mode
@each_grid
def test_hash_grid(measure: Measure, device: torch.device, grid: str, mode: str, provider: str, size: int) -> None:
    """Gradient to the table alone, as in training without normals."""
    work, hash_grid = marched(size, device), choose("hash_grid", provider)
    levels, table = make_grid(grid, device)
    run = in_mode(mode, lambda table: (hash_grid(work.unit, table, *levels),), [table])
    measure(run, f"hash_grid {grid} {mode} {size}^2", provider, work.t.shape[0])


@each_grid
def test_hash_grid_position_gradient(
    measure: Measure, device: torch.device, grid: str, provider: str, size: int
) -> None:
    """The gradient to the positions, and from a loss on it the gradients to the table and to what multiplied it."""
    work, position_gradient = marched(size, device), choose("hash_grid_position_gradient", provider)
    levels, table = make_grid(grid, device)
    table.requires_grad_()
    m = work.t.shape[0]
    grad_output = torch.randn(m, 2 * GRIDS[grid][0], device=device, requires_grad=True)
    direction = torch.randn(m, 3, device=device)

    def run() -> object:
        normals = position_gradient(grad_output, work.unit, table, *levels)
        return torch.autograd.grad(normals, (grad_output, table), direction)

    measure(run, f"hash_grid {grid} normals {size}^2", provider, m)


@each_mode
@each_degree
def test_triplane(measure: Measure, device: torch.device, degree: int, mode: str, provider: str, size: int) -> None:
    """Gradient to the planes alone, as in training without normals."""
    work, triplane, planes = marched(size, device), choose("triplane", provider), torch.randn(PLANES, device=device)
    run = in_mode(mode, lambda planes: (triplane(work.unit, planes, None, degree),), [planes])
    measure(run, f"triplane {degree} {mode} {size}^2", provider, work.t.shape[0])


@each_degree
def test_triplane_position_gradient(
    measure: Measure, device: torch.device, degree: int, provider: str, size: int
) -> None:
    """The gradient to the positions, and from a loss on it the gradients to the planes and to what multiplied it."""
    work, position_gradient = marched(size, device), choose("triplane_position_gradient", provider)
    planes, m = torch.randn(PLANES, device=device, requires_grad=True), work.t.shape[0]
    grad_output = torch.randn(m, 3 * PLANES[-1], device=device, requires_grad=True)
    direction = torch.randn(m, 3, device=device)

    def run() -> object:
        normals = position_gradient(grad_output, work.unit, planes, None, degree)
        return torch.autograd.grad(normals, (grad_output, planes), direction)

    measure(run, f"triplane {degree} normals {size}^2", provider, m)


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


class Tile:
    """All samples of the scene as one tile, in the types and strides that the streaming renderer has."""

    def __init__(self, size: int, device: torch.device) -> None:
        work = marched(size, device)
        *rays, bitfield, resolution, step, jitter, seed = work.arguments
        blocks = march_tile.occupied_blocks(bitfield, resolution)
        self.rays = march_tile.MarchedRays(
            *(ray.contiguous() for ray in rays), bitfield, blocks, resolution, step, jitter, seed
        )
        self.counts, self.firsts = march_tile.count_samples(self.rays)
        self.offsets, self.t, self.n = work.offsets, work.t, work.t.shape[0]
        ((self.ray_range, self.count),) = march_tile.tile_table(self.offsets, self.n, 1)
        self.device, self.half = device, device.type == "cuda"
        self.precision = "float16" if self.half else "float32"
        self.wide, self.narrow = (torch.float16, torch.bfloat16) if self.half else (torch.float32, torch.float32)
        self.positions = self.random(3)
        self.positions.copy_(work.unit)

    def random(self, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """`[n, channels]`, on a GPU a plane per channel."""
        if not self.half:
            return torch.randn(self.n, channels, dtype=dtype)
        capacity = -(-self.n // 8) * 8
        return torch.randn(channels, capacity, device=self.device).to(dtype)[:, : self.n].t()


@cache
def tile_of(size: int, device: torch.device) -> Tile:
    return Tile(size, device)


@pytest.mark.parametrize("name", ["occupied_blocks", "count_samples", "march_totals", "march_tile", "tile_table"])
def test_march_tile(measure: Measure, device: torch.device, name: str, provider: str, size: int) -> None:
    tile, run = tile_of(size, device), choose(name, provider, march_tile)
    samples = (torch.empty_like(tile.t), None, tile.random(3), AABB)
    arguments = {
        "occupied_blocks": (tile.rays.bitfield, RESOLUTION),
        "count_samples": (tile.rays,),
        "march_totals": (tile.rays, tile.counts, 1e-3),
        "march_tile": (tile.rays, tile.firsts, tile.offsets, tile.ray_range, 0, *samples),
        "tile_table": (tile.offsets, 1 << 12, -(-tile.n >> 12)),
    }[name]
    measure(lambda: run(*arguments), f"tile {name} {size}^2", provider, tile.n)


def run_encoding(measure: Measure, module: object, tile: Tile, table: Tensor, layout: object, *row: Any) -> None:
    """One of the functions of an encoding over tiles; `row` is its channels, name, label and provider."""
    channels, name, label, provider = row
    place = (tile.positions, table.to(tile.wide), layout)
    features, grads, direction = tile.random(channels, tile.wide), tile.random(channels, tile.narrow), tile.random(3)
    grad_table = torch.zeros_like(table)
    arguments = {
        "encode": (*place, features, tile.count),
        "position_gradient": (features, *place, tile.random(3), tile.count),
        "directional_derivative": (direction, *place, grads, tile.count),
        "derivative_before_scatter": (direction, features, grad_table, *place, grads, tile.count),
        "scatter": (grad_table, tile.positions, layout, grads, tile.count, direction, features),
    }[name]
    run, options = choose(name, provider, module), {"checked": True} if provider == "native" else {}
    measure(lambda: run(*arguments, **options), label, provider, tile.n)


each_function = pytest.mark.parametrize(
    "name",
    ["encode", "position_gradient", "directional_derivative", "derivative_before_scatter", "scatter"],
)


@each_function
@each_grid
def test_hash_grid_tile(measure: Measure, device: torch.device, grid: str, name: str, provider: str, size: int) -> None:
    levels, table = make_grid(grid, device)
    layout, row = hash_grid_tile.HashGridTileLayout(*levels), (2 * GRIDS[grid][0], name, f"tile {name} {grid} {size}^2")
    run_encoding(measure, hash_grid_tile, tile_of(size, device), table, layout, *row, provider)


@each_function
@each_degree
def test_triplane_tile(
    measure: Measure, device: torch.device, degree: int, name: str, provider: str, size: int
) -> None:
    planes, layout = torch.randn(PLANES, device=device), triplane_tile.TriplaneTileLayout(degree)
    row = (3 * PLANES[-1], name, f"tile triplane {degree} {name} {size}^2", provider)
    run_encoding(measure, triplane_tile, tile_of(size, device), planes, layout, *row)


@pytest.mark.parametrize("name", ["prepared_forward", "prepared_backward"])
def test_mlp_tile(measure: Measure, device: torch.device, name: str, provider: str, size: int) -> None:
    """32-64-64-4 with the input gradient; on a GPU in half precision, the twin in single."""
    tile = tile_of(size, device)
    weights = [torch.randn(b, a, device=device) / a**0.5 for a, b in pairwise(WIDTHS)]
    biases = [torch.randn(b, device=device) for b in WIDTHS[1:]]
    network = (tile.random(WIDTHS[0], tile.wide), weights, biases, "relu", tile.precision)
    gradients = [tile.random(4), *(tile.random(WIDTHS[0], tile.narrow) for _ in range(2))]
    arguments = {
        "prepared_forward": (*network, tile.random(4), tile.random(WIDTHS[0], tile.wide)),
        "prepared_backward": (*network, *gradients[:2], mlp_tile.MlpGradients(weights, biases), gradients[2]),
    }[name]
    run = choose(name, provider, mlp_tile)(*arguments)
    measure(lambda: run(tile.count), f"tile {name} {size}^2", provider, tile.n)


@pytest.mark.parametrize("name", ["ray_sums_forward", "ray_sums_backward", "ray_sums_visible"])
def test_ray_sums_tile(measure: Measure, device: torch.device, name: str, provider: str, size: int) -> None:
    """With normals and light, without distortion, for which the twin compares all pairs of samples."""
    tile = tile_of(size, device)
    n_rays, light = len(tile.rays), torch.tensor(LIGHT, device=device)
    head = ray_sums_tile.SampleHead((0.0, 0.0, 0.0), (2.0, 2.0, 2.0), blob_scale=5.0, shading="lambertian", light=light)
    logits, slopes = tile.random(4), tile.random(3)
    grad_sums = torch.randn(n_rays, ray_sums_tile.N_SUMS, device=device)
    op = choose(name, provider, ray_sums_tile)
    if provider == "twin":
        lengths = torch.full_like(tile.t, STEP)
        fixed = (head, tile.offsets, tile.rays.directions, tile.t, lengths, tile.positions)
        mode = name.removeprefix("ray_sums_")
        if mode == "visible":
            run = partial(op, head, tile.offsets, lengths, tile.positions, logits, 3.0)
        else:
            run = in_mode(mode, lambda *x: (op(*fixed, *x, distortion=False),), [logits, slopes])
        measure(run, f"tile {name} {size}^2", provider, tile.n)
        return
    samples = ray_sums_tile.SampleTile(
        tile.offsets, tile.ray_range, tile.rays.directions, tile.t, None, tile.positions, logits, slopes, 0, STEP
    )
    sums, prefix = torch.zeros_like(grad_sums), grad_sums.new_zeros(ray_sums_tile.N_PREFIX)
    ray_sums_tile.ray_sums_forward(head, samples, sums, prefix, False)
    suffixes = grad_sums.new_zeros(2, 1)
    arguments = {
        "ray_sums_forward": (torch.zeros_like(sums), prefix, False),
        "ray_sums_backward": (sums, grad_sums, prefix, *suffixes, tile.random(4), tile.random(3), False),
        "ray_sums_visible": (sums.new_zeros(n_rays), torch.zeros_like(tile.counts), 3.0),
    }[name]
    measure(lambda: op(head, samples, *arguments), f"tile {name} {size}^2", provider, tile.n)


@pytest.mark.parametrize("name", ["linear", "conv3x3", "group_norm"])
def test_dense(measure: Measure, device: torch.device, name: str, provider: str) -> None:
    """Layers of the embedded prior's size, of 64^2 pixels and 64 channels."""
    if device.type != "cpu" or not dense.dense_serves():
        pytest.skip("these layers are the CPU core's, for processors with AVX2")
    x, bias = torch.randn(1, 64, 64, 64), torch.randn(64)
    norm = dense.DenseGroupNorm(torch.randn(64), bias, 8, 1e-5)
    weight = torch.randn(64, 64, 3, 3) if name == "conv3x3" else torch.randn(64, 64)
    packed = dense.DenseConv(weight, bias) if name == "conv3x3" else dense.DenseLinear(weight, bias)
    layer = (norm,) if name == "group_norm" else (packed,) if provider == "native" else (weight, bias)
    run = choose(name, provider, dense)
    measure(lambda: run(x, *layer), f"dense {name}", provider, 64 * 64)


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


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_scaled_softmax(measure: Measure, device: torch.device, provider: str, way: str) -> None:
    """A part of the attention of SDXL's autoencoder at 1024^2, in half precision."""
    _needs_kernels(device)
    scores, native = torch.randn(512, 16384, device=device), provider == "native"
    if way == "forward":
        op = softmax.scaled_softmax if native else softmax.scaled_softmax_reference
        measure(lambda: op(scores, 0.04, torch.float16), "scaled_softmax", provider, len(scores))
        return
    shares = softmax.scaled_softmax_reference(scores, 0.04, torch.float16)
    back = softmax.scaled_softmax_backward if native else softmax.scaled_softmax_backward_reference
    measure(lambda: back(shares, scores, 0.04), "scaled_softmax_backward", provider, len(scores))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
