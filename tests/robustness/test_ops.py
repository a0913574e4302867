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
from op_makers import MAKERS, Arguments, Maker
from torch import Tensor

from dreamfusion_fast import ops

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
    if name.endswith("_position_gradient"):  # its grid or planes follow by position
        return getattr(ops, f"{name}_reference")(*taken.values())
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
    "triplane",
    "triplane_position_gradient",
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
    if name in ("hash_grid_position_gradient", "triplane_position_gradient"):
        table = "table" if name.startswith("hash_grid") else "planes"
        return all(bool(arguments[key].isfinite().all()) for key in ("grad_output", table))
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


def assert_sound(name: str, arguments: Arguments) -> None:
    """The op agrees with its twin, or says in one line which argument it cannot take."""
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
        assert_sound(name, arguments)

    run()


FLOAT_PARAMETERS = [
    (name, key)
    for name in NAMES
    for key, parameter in inspect.signature(getattr(ops, name)).parameters.items()
    if re.search(r"\bfloat\b", inspect.formatannotation(parameter.annotation))
]


@pytest.mark.parametrize(("name", "key"), FLOAT_PARAMETERS)
def test_an_int_beyond_64_bits_where_a_float_is_meant(name: str, key: str) -> None:
    """A tensor does not take one, where pybind11 makes a float of it: twins did not follow their ops."""

    @settings(SETTINGS, max_examples=3)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        arguments = MAKERS[name](Maker(data))
        assert_sound(name, arguments | {key: 10**30})

    run()
