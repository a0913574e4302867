"""Arguments of every public op, as hypothesis makes them up: all of them valid.

`MAKERS` has a function for each op of `dreamfusion_fast.ops`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dreamfusion_fast import ops
from dreamfusion_fast.ops.hash_grid_placement import hash_grid_placements

Arguments = dict[str, Any]


class Maker:
    """Makes arguments: choices are hypothesis', values a generator's whose seed hypothesis chooses."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data
        self._generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))

    def choose(self, *choices: Any) -> Any:
        return self._data.draw(st.sampled_from(choices))

    def size(self) -> int:
        return self.choose(0, 1, 2, 5, 33)

    def dtype(self) -> torch.dtype:
        return self.choose(torch.float32, torch.float64)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32, low: float = 0.0, high: float = 1.0) -> Tensor:
        values = torch.rand(shape, generator=self._generator, dtype=torch.float64)
        return (low + (high - low) * values).to(dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, generator=self._generator).to(dtype)

    def laid_out(self, tensor: Tensor) -> Tensor:
        """The same values, elsewhere in memory."""
        kind = self.choose("as it is", "strided", "turned", "unaligned", "negated")
        if kind == "strided":
            return torch.stack([tensor, tensor], dim=-1)[..., 0]
        if kind == "turned" and tensor.dim() > 1:
            return tensor.transpose(0, -1).contiguous().transpose(0, -1)
        if kind == "unaligned":
            return torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:].view(tensor.shape)
        if kind == "negated" and tensor.is_floating_point():
            return torch._neg_view(-tensor)  # as of the imaginary part of a conjugate
        return tensor


def rays(make: Maker) -> Arguments:
    dtype, n = make.dtype(), make.size()
    directions = make.uniform(n, 3, dtype=dtype, low=-1)
    if make.choose(False, True):
        directions[:, make.choose(0, 1, 2)] = 0
    low = make.uniform(3, dtype=dtype, low=-1.5, high=-0.5)
    aabb = torch.cat([low, low + make.uniform(3, dtype=dtype, low=0.1, high=2)])
    return {"origins": make.uniform(n, 3, dtype=dtype, low=-2, high=2), "directions": directions, "aabb": aabb}


def ray_box(make: Maker) -> Arguments:
    return rays(make) | {"near": make.choose(0.0, -math.inf, 0.7), "far": make.choose(math.inf, 1.5, 0.0)}


def march(make: Maker) -> Arguments:
    arguments = rays(make)
    n, dtype = arguments["origins"].shape[0], arguments["origins"].dtype
    cascades, resolution = make.choose(1, 1, 2, 3), make.choose(2, 4, 10)
    resolution -= make.choose(0, 1) if cascades == 1 else 0
    bits = make.integers(0, 256, (cascades * resolution**3 + 7) // 8, dtype=torch.uint8)
    return arguments | {
        "t_near": make.uniform(n, dtype=dtype),
        "t_far": make.uniform(n, dtype=dtype, high=4),
        "bitfield": make.choose(bits, bits, None),
        "resolution": resolution,
        "step": make.choose(0.01, 0.1, 3.0),
        "jitter": make.choose(False, True),
        "seed": make.choose(0, 1, 2**63 - 1),
        "cascades": cascades,
        "capacity": make.choose(None, 0, 7, 1000),
    }


def march_lattice(make: Maker) -> Arguments:
    arguments = march(make)
    del arguments["step"]
    steps = make.uniform(make.choose(1, 2, 41), dtype=torch.float64, low=0.01, high=0.2)
    return arguments | {"distances": steps.cumsum(0).to(arguments["origins"].dtype)}


def composite(make: Maker) -> Arguments:
    dtype, unused = make.dtype(), make.choose(0, 0, 4)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), make.integers(0, 9, make.size()).cumsum(0)])
    n = int(offsets[-1]) + unused
    density = make.uniform(n, dtype=dtype, low=make.choose(0.0, -5.0), high=make.choose(0.1, 50.0))
    if make.choose(False, True):
        density[make.uniform(n) < 0.1] = make.choose(0.0, math.inf)
    return {
        "density": density,
        "values": make.uniform(n, make.choose(1, 3, 5), dtype=dtype, low=-1),
        "t": make.uniform(n, dtype=dtype, high=5),
        "step": make.choose(
            0.05, 1, make.uniform(n, dtype=dtype, low=0.01), (make.uniform(n, dtype=dtype) - 0.2).relu()
        ),
        "offsets": offsets.to(torch.int32),
    }


def composite_alpha(make: Maker) -> Arguments:
    arguments = composite(make)
    dtype, n = arguments.pop("density").dtype, arguments["t"].shape[0]
    del arguments["step"]
    alpha = make.uniform(n, dtype=dtype, low=make.choose(0.0, -0.5), high=make.choose(0.1, 1.0, 1.5))
    if make.choose(False, True):
        alpha[make.uniform(n) < 0.1] = make.choose(0.0, 1.0)
    return {"alpha": alpha} | arguments


def weights_from_density(make: Maker) -> Arguments:
    arguments = composite(make)
    return {key: arguments[key] for key in ("density", "step", "offsets")}


def weights_from_alpha(make: Maker) -> Arguments:
    arguments = composite_alpha(make)
    return {key: arguments[key] for key in ("alpha", "offsets")}


def traverse(make: Maker) -> Arguments:
    arguments = march(make)
    dtype, levels = arguments["origins"].dtype, make.choose(1, 2, 3)
    low = make.uniform(levels, 3, dtype=dtype, low=-1.5, high=0.0)
    shape = [make.choose(1, 2, 9) for _ in range(3)]
    step = make.choose(0.02, 0.1, 3.0, 0, -1)
    return {key: arguments[key] for key in ("origins", "directions", "t_near", "t_far")} | {
        "boxes": torch.cat([low, low + make.uniform(levels, 3, dtype=dtype, low=0.1, high=2)], dim=1),
        "occupied": make.uniform(levels, *shape) < make.choose(0.1, 0.6),
        "step": step,
        "cone_angle": make.choose(0, 0.0, 0.01, 0.5),
        "max_step": make.choose(math.inf, max(step, 0.3)),
        "limit": make.choose(None, None, 1, 7),
    }


def march_morton(make: Maker) -> Arguments:
    arguments = march(make)
    n, dtype = arguments["origins"].shape[0], arguments["origins"].dtype
    resolution, cascades, step = make.choose(2, 4, 16), make.choose(1, 2, 3), make.choose(0.02, 0.1, 3.0)
    bits = make.integers(0, 256, cascades * resolution**3 // 8, dtype=torch.uint8)
    return {key: arguments[key] for key in ("origins", "directions", "t_near", "t_far")} | {
        "noise": make.uniform(n, dtype=dtype),
        "bitfield": bits & make.choose(255, 17, 0),
        "resolution": resolution,
        "cascades": cascades,
        "bound": make.choose(0.7, 1, 2.0, 4.0),
        "min_step": step,
        "max_step": step * make.choose(1.0, 5.0),
        "cone_angle": make.choose(0, 0.01, 0.5),
        "limit": make.choose(1, 7, 300),
        "contract": make.choose(False, False, True),
    }


def hash_grid_layout(make: Maker) -> Arguments:
    base = make.choose(1, 3, 16)
    finest = base * make.choose(1, 2, 77)
    return {
        "levels": make.choose(1, 2, 16),
        "base_resolution": base,
        "finest_resolution": finest,
        "log2_rows": make.choose(3, 8, 19),
    }


def hash_grid(make: Maker) -> Arguments:
    dtype = make.dtype()
    offsets, resolutions = ops.hash_grid_layout(make.choose(1, 2, 5), make.choose(1, 3), make.choose(4, 90), 7)
    placements, dims = None, 3
    if make.choose(False, True):
        ends, dims = resolutions.tolist(), make.choose(2, 3)
        sides, highest = [end + make.choose(0, 1) for end in ends], make.choose(None, ends)
        shift, hashes = make.choose(0, 0.5, -0.5), make.choose(True, False)
        placements = hash_grid_placements([0.9 * end for end in ends], sides, shift, highest, hashes, dims)
    return {
        "positions": make.uniform(make.size(), dims, dtype=dtype, low=-0.1, high=1.1),
        "table": make.uniform(int(offsets[-1]), make.choose(1, 2, 4, 8), dtype=dtype, low=-1),
        "level_offsets": offsets,
        "resolutions": resolutions,
        "smoothstep": make.choose(False, True),
        "placements": placements,
    }


def hash_grid_position_gradient(make: Maker) -> Arguments:
    arguments = hash_grid(make)
    n, features = arguments["positions"].shape[0], arguments["table"].shape[1]
    width = arguments["resolutions"].shape[0] * features
    return {"grad_output": make.uniform(n, width, dtype=arguments["positions"].dtype, low=-1)} | arguments


def triplane(make: Maker) -> Arguments:
    dtype, n, degree, n_scenes = make.dtype(), make.size(), make.choose(1, 2), make.choose(1, 3)
    shape = (n_scenes, 3, *(make.choose(degree + 1, 5, 16) for _ in range(2)), make.choose(1, 3, 4, 8, 13))
    scenes = make.integers(0, n_scenes, n, dtype=make.choose(torch.int32, torch.int64))
    return {
        "positions": make.uniform(n, 3, dtype=dtype, low=-0.1, high=1.1),
        "planes": make.uniform(*shape, dtype=dtype, low=-1),
        "scenes": make.choose(scenes, scenes, None),
        "degree": degree,
    }


def triplane_position_gradient(make: Maker) -> Arguments:
    arguments = triplane(make)
    n, features = arguments["positions"].shape[0], arguments["planes"].shape[4]
    return {"grad_output": make.uniform(n, 3 * features, dtype=arguments["positions"].dtype, low=-1)} | arguments


def mlp(make: Maker) -> Arguments:
    dtype = make.dtype()
    sizes = [make.choose(1, 7, 32), *(make.choose(1, 5, 16) for _ in range(make.choose(1, 2))), make.choose(1, 4)]
    pairs = list(zip(sizes[1:], sizes[:-1], strict=True))
    biases = [make.uniform(out, dtype=dtype, low=-1) for out, _ in pairs]
    return {
        "x": make.uniform(make.size(), sizes[0], dtype=dtype, low=-1),
        "weights": [make.uniform(*pair, dtype=dtype, low=-1) for pair in pairs],
        "biases": make.choose(biases, None),
        "activation": make.choose("relu", "softplus", "silu"),
        "precision": "float32",  # others have no twin to agree with
    }


def occupancy_pack(make: Maker) -> Arguments:
    size, cascades = make.choose(1, 2, 5), make.choose((), (1,), (3,))
    return {"grid": make.uniform(*cascades, size, size, size), "threshold": make.choose(0.5, -1, torch.tensor(0.3))}


def occupancy_unpack(make: Maker) -> Arguments:
    resolution, cascades = make.choose(1, 2, 5), make.choose(1, 3)
    bits = make.integers(0, 256, (cascades * resolution**3 + 7) // 8, dtype=torch.uint8)
    return {"bitfield": bits, "resolution": resolution, "cascades": cascades}


def occupancy_update(make: Maker) -> Arguments:
    grid = occupancy_pack(make)["grid"]
    n = make.size()
    cells = make.choose(None, make.integers(0, grid.numel(), n, dtype=make.choose(torch.int32, torch.int64)))
    density = make.uniform(grid.numel() if cells is None else n, low=-0.5)
    for tensor in (grid, density):
        if make.choose(False, False, True):
            tensor[make.uniform(*tensor.shape) < 0.2] = make.choose(math.nan, math.inf, -math.inf, -1.0)
    return {"grid": grid, "cells": cells, "density": density, "decay": make.choose(0, 0.95, 1.0)}


MAKERS: dict[str, Callable[[Maker], Arguments]] = {
    function.__name__: function
    for function in (
        *(
            composite,
            composite_alpha,
            weights_from_alpha,
            weights_from_density,
            hash_grid,
            hash_grid_layout,
            hash_grid_position_gradient,
            march,
            march_lattice,
            mlp,
        ),
        *(march_morton, occupancy_pack, occupancy_unpack, occupancy_update, ray_box, traverse),
        *(triplane, triplane_position_gradient),
    )
} | {"mlp_with_input_gradient": mlp, "march_morton_rows": march_morton}
