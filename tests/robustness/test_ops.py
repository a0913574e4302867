"""Every public op under calls that hypothesis makes up: valid ones agree with the twin, others end in one clear line.

About 1,500 calls, the same ones each time. DREAMFUSION_FAST_LONG_TESTS=1 makes 20,000 that differ from run to run.
"""

from __future__ import annotations

import inspect
import math
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from forms import LONG
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dreamfusion_fast import ops
from dreamfusion_fast.ops.hash_grid_placement import hash_grid_placements

NAMES = sorted(name for name in ops.__all__ if not name.endswith("_reference"))
CALLS = 20_000 if LONG else 1_500
SETTINGS = settings(
    max_examples=CALLS // (2 * len(NAMES)) + 1,
    derandomize=not LONG,
    deadline=None,  # a call has its own, MOST_SECONDS
    database=None,
    suppress_health_check=list(HealthCheck),
)
MOST_SECONDS = 5.0
# Their results decide which samples exist, and have to be the twins' in every bit.
EXACT = {
    "march",
    "march_lattice",
    "march_morton",
    "march_morton_rows",
    "occupancy_pack",
    "occupancy_unpack",
    "occupancy_update",
    "ray_box",
    "traverse",
}
# Relative to the largest value. The twin of `composite` takes differences of a sum over all rays, opaque ones included.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}

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
    )
} | {"mlp_with_input_gradient": mlp, "march_morton_rows": march_morton}


def unpacked(bitfield: Tensor, resolution: int, cascades: int = 1) -> Tensor:
    """The twin that `occupancy_unpack` lacks."""
    shape = (cascades,) * (cascades > 1) + (resolution,) * 3
    bits = [byte >> bit & 1 for byte in bitfield.tolist() for bit in range(8)]
    return torch.tensor(bits[: math.prod(shape)], dtype=torch.bool).view(shape)


def laid_out_rows(levels: int, base_resolution: int, finest_resolution: int, log2_rows: int) -> tuple[Tensor, Tensor]:
    """The twin that `hash_grid_layout` lacks: Müller et al. 2022, eq. 2 and 3, by logarithms."""
    growth = (math.log(finest_resolution) - math.log(base_resolution)) / max(levels - 1, 1)
    sizes = [math.floor(base_resolution * math.exp(growth * level) + 1e-6) for level in range(levels)]
    rows = torch.tensor([0] + [math.ceil(min((size + 1) ** 3, 2**log2_rows) / 8) * 8 for size in sizes])
    return rows.cumsum(0), torch.tensor(sizes, dtype=torch.int32)


TWINS: dict[str, Callable[..., Any]] = {"occupancy_unpack": unpacked, "hash_grid_layout": laid_out_rows}


def call_twin(name: str, arguments: Arguments) -> Any:
    """What the twin makes of the same arguments, shaped as the op's result."""
    taken = dict(arguments)
    capacity = taken.pop("capacity", None)
    taken.pop("precision", None)
    if name == "hash_grid_position_gradient":  # its grid follows by position
        return ops.hash_grid_position_gradient_reference(*taken.values())
    results = TWINS.get(name, getattr(ops, f"{name}_reference", None))(**taken)
    if capacity is None:
        return results
    offsets, t, ray_indices, *lengths = results
    room = (0, capacity - t.shape[0])
    last_ray = max(offsets.shape[0] - 2, 0)
    padded = [torch.nn.functional.pad(x, room, value=0) for x in (t, *lengths)]
    return offsets, padded[0], torch.nn.functional.pad(ray_indices, room, value=last_ray), *padded[1:]


def call(name: str, function: Callable[..., Any], arguments: Arguments) -> list[Tensor]:
    """Its results; of one that works in place, what it made of a copy."""
    if name == "occupancy_update":
        grid = arguments["grid"]
        arguments = arguments | {"grid": grid.clone() if isinstance(grid, Tensor) else grid}
        assert function(arguments) is None
        return [arguments["grid"]]
    results = function(arguments)
    return list(results) if isinstance(results, tuple) else [results]


def call_op(name: str, arguments: Arguments) -> list[Tensor]:
    start = time.monotonic()
    try:
        return call(name, lambda taken: getattr(ops, name)(**taken), arguments)
    finally:
        assert time.monotonic() - start < MOST_SECONDS


def assert_agree(name: str, actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for mine, twins in zip(actual, expected, strict=True):
        assert (mine.shape, mine.dtype, mine.device) == (twins.shape, twins.dtype, twins.device)
        if mine.device.type == "meta" or mine.numel() == 0:
            continue
        scale = 1.0
        if mine.is_floating_point() and name not in EXACT:
            numbers = twins.detach()[twins.detach().isfinite()].abs()
            scale = max(1.0, float(numbers.max()) if numbers.numel() else 1.0)
        tolerance = 0.0 if name in EXACT else TOLERANCES.get(mine.dtype, 0.0) * scale
        torch.testing.assert_close(mine, twins, rtol=0, atol=tolerance, equal_nan=True)


def leaves(arguments: Arguments) -> list[Tensor]:
    flat = [x for value in arguments.values() for x in (value if isinstance(value, list) else [value])]
    return [x for x in flat if isinstance(x, Tensor) and x.requires_grad]


def gradients(results: list[Tensor], arguments: Arguments) -> list[Tensor]:
    """Of a weighted sum of all results, to all arguments that want one; zeros where there is none."""
    total = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in results)
    wanted = leaves(arguments)
    found = torch.autograd.grad(total, wanted, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(wanted, found, strict=True)]


DIFFERENTIABLE = {
    "composite",
    "composite_alpha",
    "weights_from_alpha",
    "weights_from_density",
    "hash_grid",
    "hash_grid_position_gradient",
    "mlp",
    "mlp_with_input_gradient",
}
NO_GRADIENT = {"t", "step"}


@pytest.fixture(autouse=True, scope="module")
def imported() -> None:
    """The first call of an op makes torch import its compiler, which takes seconds of its own."""
    ops.ray_box(torch.zeros(1, 3), torch.ones(1, 3), torch.arange(6.0))


def test_every_public_op_is_called() -> None:
    assert set(MAKERS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_valid_calls_agree_with_the_twin(name: str) -> None:
    @SETTINGS
    @given(st.data())
    def run(data: st.DataObject) -> None:
        make = Maker(data)
        arguments = MAKERS[name](make)
        for key, value in arguments.items():
            if isinstance(value, Tensor) and (name, key) != ("occupancy_update", "grid"):
                arguments[key] = make.laid_out(value)
            elif isinstance(value, list):
                arguments[key] = [make.laid_out(x) for x in value]
        if make.choose(False, True):
            for key, value in arguments.items():
                for x in value if isinstance(value, list) else [value]:
                    if isinstance(x, Tensor) and x.is_floating_point() and key not in NO_GRADIENT:
                        x.requires_grad_()
        actual = call_op(name, arguments)
        expected = call(name, lambda taken: call_twin(name, taken), arguments)
        assert_agree(name, actual, expected)
        if name in DIFFERENTIABLE:  # what is given is finite, or a density
            assert all(bool(x.isfinite().all()) for x in actual)
            if leaves(arguments):
                found, wanted = gradients(actual, arguments), gradients(expected, arguments)
                assert all(bool(x.isfinite().all()) for x in found)
                assert_agree(name, found, wanted)

    run()


def hostile_tensor(make: Maker, given: Tensor) -> Any:
    """Something like `given`, and wrong or strange in one way."""
    kind = make.choose("dtype", "shape", "device", "layout", "values")
    if kind == "dtype":
        kinds = (torch.float16, torch.bfloat16, torch.complex64, torch.bool, torch.int8, torch.int32, torch.int64)
        return given.detach().to(make.choose(*kinds, torch.float32, torch.float64))
    if kind == "shape":
        return make.choose(
            given[None],
            given.reshape(-1),
            given[..., :0] if given.dim() else given[None],
            given[:0] if given.dim() else given[None],
            torch.cat([given, given]) if given.dim() else given[None],
            given.sum(),
        )
    if kind == "device":
        return given.to("meta")
    if kind == "layout":
        return make.choose(given.to_sparse, lambda: torch.nested.nested_tensor([given]), given.numpy)()
    if given.is_floating_point():
        values = (math.nan, math.inf, -math.inf, 1e30, -1e30, -1.0, 0.0, torch.finfo(given.dtype).tiny / 4)
    elif given.dtype == torch.bool:
        values = (False, True)
    else:
        info = torch.iinfo(given.dtype)
        values = (info.min, info.max, max(info.min, -1), 0, 1)
    hostile = given.clone()
    flat = hostile.view(-1)
    where = make.uniform(flat.shape[0]) < make.choose(0.2, 2.0)
    flat[where] = make.choose(*values)
    return hostile


ODD = (None, "", "x", b"x", 1j, [], {}, (), object(), torch.float32, [None], ["x"], int, range(3))
NUMBERS = (*(True, -1, 0, 1, 2, 3, 17, 2**31, 2**63, -(2**63), 10**30, 10**400, -(10**5000)), *(0.5, -0.5, 1e300))
FLOATS = (math.nan, math.inf, -math.inf, 1e-30, 1e-320, -0.0, torch.tensor(1.0), torch.tensor([1, 2]))


def hostile(make: Maker, given: Any) -> Any:
    kinds = ["odd", "number", "float"]
    kinds += ["tensor"] * 5 if isinstance(given, Tensor) else ["list"] * 5 if isinstance(given, list) else []
    kind = make.choose(*kinds)
    if kind == "tensor":
        return hostile_tensor(make, given)
    if kind == "list":
        place = make.choose(*range(len(given)))
        part = make.choose(None, hostile_tensor(make, given[place]))
        return make.choose([*given[:place], part, *given[place + 1 :]], given[1:], given + given, given[::-1], given[0])
    return make.choose(*{"odd": ODD, "number": NUMBERS, "float": FLOATS}[kind])


def twin_can_follow(name: str, arguments: Arguments) -> bool:
    """Not where it would visit millions of samples, needs values, or has other NaN where infinities are added up."""
    if name == "hash_grid_position_gradient":
        return all(bool(arguments[key].isfinite().all()) for key in ("grad_output", "table"))
    if name in ("composite_alpha", "weights_from_alpha", "weights_from_density"):  # 0 times NaN behind what is opaque
        tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
        return not any(x.device.type == "meta" or bool(x.isnan().any()) for x in tensors)
    if name == "composite":  # the twin's sum runs over all rays, and takes a NaN along to the next
        return not bool(arguments["density"].isnan().any())
    if name == "occupancy_unpack":
        return arguments["bitfield"].device.type != "meta"
    if name.startswith("march_morton"):
        numbers = [arguments[key] for key in ("origins", "directions", "t_near", "t_far", "noise")]
        return arguments["min_step"] >= 1e-3 and not any(bool((x.abs() > 1e3).any()) for x in numbers)
    if name == "traverse":
        numbers = [arguments[key] for key in ("origins", "directions", "t_near", "boxes")]
        large = any(bool((x.abs() > 1e3).any()) for x in numbers)
        return (arguments["step"] <= 0 or arguments["step"] >= 1e-3) and not large
    far = any(bool((arguments[key].abs() > 1e3).any()) for key in ("origins", "aabb") if key in arguments)
    return name != "march" or (arguments["step"] >= 1e-3 and not far)


@pytest.mark.parametrize("name", NAMES)
def test_hostile_calls_end_in_a_line_that_names_the_argument(name: str) -> None:
    @SETTINGS
    @given(st.data())
    def run(data: st.DataObject) -> None:
        make = Maker(data)
        arguments = MAKERS[name](make)
        if name == "march":  # whose rays may have 2^24 samples each, as it says: for many that is gigabytes
            arguments |= {key: arguments[key][:2] for key in ("origins", "directions", "t_near", "t_far")}
        for key in {make.choose(*arguments), make.choose(*arguments)}:
            arguments[key] = hostile(make, arguments[key])
        if name == "traverse" and isinstance(arguments["step"], float) and 0 < arguments["step"] < 1e-9:
            return  # 2^24 samples of each ray, as it says: right, but gigabytes
        try:
            actual = call_op(name, arguments)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            message = str(error)
            # `mlp_with_input_gradient` and the like check under the name of what they share.
            assert re.match(rf"{name.removesuffix('_position_gradient')}\w*: .+$", message), message
            assert any(re.search(rf"\b{key}\b", message) for key in inspect.signature(getattr(ops, name)).parameters)
            assert len(message) < 500
            return
        if twin_can_follow(name, arguments):
            assert_agree(name, actual, call(name, lambda taken: call_twin(name, taken), arguments))

    run()
