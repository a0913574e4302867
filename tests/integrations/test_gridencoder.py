"""GridEncoder against an emulator of gridencoder, and its backend functions as its wrappers call them."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from other_grids import grid_encoder, level_scale, row_of
from torch import Tensor

from dreamfusion_fast.integrations.gridencoder import GridEncoder, backend, install

F64 = torch.float64
SMALL = {"num_levels": 4, "per_level_scale": 1.7, "base_resolution": 3, "log2_hashmap_size": 7}
FLAVOURS = ("stable-dreamfusion", "torch-ngp")
OPTIONS = [
    {"gridtype": gridtype, "align_corners": align, "interpolation": interpolation, "flavour": kind}
    for kind in FLAVOURS
    for align in (False, True)
    for gridtype, interpolation in (("hash", "linear"), ("hash", "smoothstep"), ("tiled", "linear"))
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))


def encoder(dtype: torch.dtype = F64, device: str | torch.device = "cpu", **options: Any) -> GridEncoder:
    made = GridEncoder(**{**SMALL, **options}).to(device, dtype)
    with torch.no_grad():
        made.embeddings.copy_(torch.randn(made.embeddings.shape, dtype=F64))
    return made


def emulated(grid: GridEncoder, inputs: Tensor, bound: float = 1.0) -> Tensor:
    unit = (inputs.detach().double().cpu().numpy() + bound) / (2 * bound)
    options = {name: getattr(grid, name) for name in ("gridtype", "align_corners", "interpolation", "flavour")}
    table = grid.embeddings.detach().double().cpu().numpy()
    rows = grid.offsets.tolist()
    found = grid_encoder(unit, table, rows, grid.per_level_scale, grid.base_resolution, **options)
    return torch.from_numpy(found).to(inputs.device)


def points(n: int, dims: int, dtype: torch.dtype = F64, device: str | torch.device = "cpu") -> Tensor:
    """In [-1, 1], some of them outside, and corners."""
    x = torch.rand(n, dims, dtype=F64) * 2.1 - 1.05
    if n > 3:
        x[0], x[1], x[2] = -1, 1, 0.999
    return x.to(device, dtype)


@every_option
@pytest.mark.parametrize("dims", [2, 3, 4])
def test_it_is_gridencoder(options: dict[str, Any], dims: int, device: torch.device) -> None:
    grid, inputs = encoder(F64, device, input_dim=dims, **options), points(41, dims, F64, device)
    assert (grid(inputs) - emulated(grid, inputs)).abs().max().item() < 1e-12
    single, inputs = encoder(torch.float32, device, input_dim=dims, **options), inputs.float()
    result = single(inputs)
    assert result.dtype == torch.float32
    # The position rounds to 15 cells; values are up to 4.
    assert (result - emulated(single, inputs)).abs().max().item() < 3e-5


@pytest.mark.parametrize("level_dim", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("shape", [(0,), (1,), (113,), (3, 5)])
def test_shapes(shape: tuple[int, ...], level_dim: int, device: torch.device) -> None:
    grid = encoder(F64, device, level_dim=level_dim)
    inputs = (torch.rand(*shape, 6, dtype=F64, device=device) * 6 - 3)[..., ::2]
    result = grid(inputs, bound=3)
    assert result.shape == (*shape, 4 * level_dim) == (*shape, grid.output_dim)
    torch.testing.assert_close(result.view(-1, 4 * level_dim), emulated(grid, inputs.reshape(-1, 3), 3))


def test_outside_is_zero_without_gradients(device: torch.device) -> None:
    grid = encoder(F64, device)
    inputs = torch.tensor(
        [[0.3, 0.2, 1.0001], [-1.5, 0, 0], [0.3, 0.2, 0.1]], dtype=F64, device=device
    ).requires_grad_()
    result = grid(inputs)
    assert result.ne(0).any(1).tolist() == [False, False, True]
    by_inputs, by_table = torch.autograd.grad(result[:2].sum(), (inputs, grid.embeddings))
    assert not by_inputs.any()
    assert not by_table.any()


@pytest.mark.quick(1)
@every_option
def test_derivatives(options: dict[str, Any]) -> None:
    """First and second, where gridencoder has the first alone."""
    grid = encoder(**{**options, "level_dim": 1})
    inputs = torch.rand(3, 3, dtype=F64).mul(1.6).sub(0.8).requires_grad_()

    def run(inputs: Tensor, table: Tensor) -> Tensor:
        return torch.func.functional_call(grid, {"embeddings": table}, (inputs,))

    arguments = (inputs, grid.embeddings.detach().requires_grad_())
    assert torch.autograd.gradcheck(run, arguments)
    assert torch.autograd.gradgradcheck(run, arguments)


def test_the_parameters_are_those_of_gridencoder() -> None:
    """Rows by its own formula, which its state dicts and ours have to share."""
    default = GridEncoder(log2_hashmap_size=14)
    assert list(default.state_dict()) == ["embeddings", "offsets"]
    rows = [min(2**14, math.ceil((16 * 2**i + 1) ** 3 / 8) * 8) for i in range(16)]
    assert default.offsets.dtype == torch.int32
    assert default.offsets.tolist() == [sum(rows[:i]) for i in range(17)]
    assert default.embeddings.shape == (sum(rows), 2)
    assert default.n_params == 2 * sum(rows)
    assert default.embeddings.abs().max().item() <= 1e-4
    aligned = GridEncoder(
        num_levels=3, log2_hashmap_size=10, desired_resolution=16, base_resolution=4, align_corners=True
    )
    assert aligned.per_level_scale == pytest.approx(2)
    assert aligned.offsets.diff().tolist() == [4**3, 8**3, 1024]
    GridEncoder(log2_hashmap_size=14, gridtype="tiled").load_state_dict(default.state_dict())


def test_a_pickled_module_of_a_project_becomes_ours() -> None:
    """Its state is that of its own class, which knows of no flavour."""
    grid = encoder(torch.float32)
    state = {key: value for key, value in grid.__dict__.items() if key != "flavour"}
    taken = GridEncoder.__new__(GridEncoder)
    taken.__setstate__(state)
    inputs = points(5, 3, torch.float32)
    assert torch.equal(taken(inputs), grid(inputs))


def test_first_levels_only(device: torch.device) -> None:
    inputs = points(9, 3, F64, device)
    for kind, max_level, levels in (
        (FLAVOURS[0], 0.5, 2),
        (FLAVOURS[0], 0.0, 1),
        (FLAVOURS[1], 3, 3),
        (FLAVOURS[1], 99, 4),
    ):
        grid = encoder(F64, device, flavour=kind)
        whole, part = grid(inputs), grid(inputs, max_level=max_level)
        assert torch.equal(part[:, : 2 * levels], whole[:, : 2 * levels])
        assert not part[:, 2 * levels :].any()


@pytest.mark.gpu
def test_autocast_gives_half() -> None:
    grid = encoder(torch.float32, "cuda")
    inputs = points(113, 3, torch.float32, "cuda")
    with torch.autocast("cuda"):
        result = grid(inputs)
    assert result.dtype == torch.float16
    torch.testing.assert_close(result, grid(inputs).half())


@every_option
def test_total_variation(options: dict[str, Any]) -> None:
    grid, inputs = encoder(**options), points(23, 3)
    grid.embeddings.grad = torch.ones_like(grid.embeddings)
    grid.grad_total_variation(0.5, inputs)
    expected, table = torch.ones_like(grid.embeddings).numpy(), grid.embeddings.detach().numpy()
    offsets, align, clamps = grid.offsets.tolist(), grid.align_corners, grid.flavour == FLAVOURS[0]
    for x in (inputs.numpy() + 1) / 2:
        if (x < 0).any() or (x > 1).any():
            continue
        for level in range(4):
            size = level_scale(level, 1.7, 3)
            if clamps:
                n = side = math.ceil(size)
                u = x * (n - 1) if align else np.clip(x * n - 0.5, 0, n - 1)
                cell = [min(math.floor(c), n - 2) if align else math.floor(c) for c in u]
            else:
                scale = float(size - np.float32(1))
                n = math.ceil(scale) + 1
                side, cell = n + (not align), [math.floor(c * scale + (0 if align else 0.5)) for c in x]
            rows = table[offsets[level] : offsets[level + 1]]
            own, hashed = row_of(cell, side, len(rows), grid.gridtype == "hash"), grid.gridtype == "hash"
            near = [[c + s * (i == axis) for i, c in enumerate(cell)] for axis in range(3) for s in (1, -1)]
            there = [c < n if s == 1 else c > 0 for c in cell for s in (1, -1)]
            steps = [
                rows[own] - rows[row_of(v, side, len(rows), hashed)] for v, t in zip(near, there, strict=True) if t
            ]
            slope = sum(steps) / np.sqrt(sum(step**2 for step in steps) + 1e-9)
            expected[offsets[level] + own] += 0.5 / 6 * slope
    np.testing.assert_allclose(grid.embeddings.grad.numpy(), expected, rtol=1e-11)
    grid.grad_total_variation(B=100)  # at random
    assert grid.embeddings.grad.isfinite().all()


def test_weight_decay() -> None:
    grid = encoder()
    with pytest.raises(ValueError, match=r"grad_weight_decay: embeddings.grad must be there"):
        grid.grad_weight_decay()
    grid.embeddings.grad = torch.zeros_like(grid.embeddings)
    grid.grad_weight_decay(0.3)
    mean_squares = sum(part.square().sum() / len(part) for part in grid.embeddings.split(grid.offsets.diff().tolist()))
    (expected,) = torch.autograd.grad(0.3 * mean_squares, grid.embeddings)
    torch.testing.assert_close(grid.embeddings.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, F64])
@pytest.mark.parametrize("form", ["stable-dreamfusion", "torch-ngp", "flag", "old"])
def test_compiled_functions(form: str, dtype: torch.dtype, device: torch.device) -> None:
    """What they write to the caller's tensors, in each of the forms that wrappers call them in."""
    old = form == "old"
    align, interpolation = not old, 1 if form in FLAVOURS else 0
    kind = FLAVOURS[0] if form == FLAVOURS[0] else FLAVOURS[1]
    options = {"align_corners": align, "interpolation": ("linear", "smoothstep")[interpolation], "flavour": kind}
    grid = encoder(F64, device, **options)
    with torch.no_grad():
        grid.embeddings.copy_(grid.embeddings.to(dtype))
    inputs, table = torch.rand(23, 3, device=device), grid.embeddings.detach().to(dtype)
    outputs = torch.zeros(4, 23, 2, device=device, dtype=dtype)
    dy_dx = torch.zeros(23, 4 * 3 * 2, device=device, dtype=dtype)
    grad, levels = torch.randn(4, 23, 2, device=device).to(dtype), 3 if form == FLAVOURS[0] else 4
    by_table, by_inputs = torch.zeros_like(table), torch.zeros_like(inputs, dtype=dtype)
    head = (23, 3, 2, 4, *((3,) if form == FLAVOURS[0] else ()), np.log2(1.7), 3)
    flag = (True,) if form in ("flag", "old") else ()
    tail = {"flag": (0, align), "old": (0,)}.get(form, (0, align, interpolation))
    backend.grid_encode_forward(inputs, table, grid.offsets, outputs, *head, *flag, dy_dx, *tail)
    arrays = (grad, inputs, table, grid.offsets, by_table)
    backend.grid_encode_backward(*arrays, *head, *flag, dy_dx, by_inputs, *tail)

    exact = inputs.double().requires_grad_()
    wanted = grid(exact * 2 - 1).unflatten(1, (4, 2)).transpose(0, 1)[:levels]
    gradients = torch.autograd.grad(wanted, (exact, grid.embeddings), grad[:levels].double(), retain_graph=True)
    eps = torch.finfo(torch.float16 if dtype == torch.float16 else torch.float32).eps
    for actual, expected in zip((outputs[:levels], by_inputs, by_table), (wanted, *gradients), strict=True):
        scale = max(1.0, expected.abs().max().item())
        assert (actual.double() - expected).abs().max().item() <= 64 * eps * scale
    assert not outputs[levels:].any()
    assert not dy_dx.view(23, 4, 6)[:, levels:].any()


def test_without_input_gradients() -> None:
    grid, inputs = encoder(torch.float32), torch.rand(5, 3)
    outputs, grads = torch.zeros(4, 5, 2), torch.zeros_like(grid.embeddings)
    sizes = (5, 3, 2, 4, 4, np.log2(1.7), 3)
    backend.grid_encode_forward(inputs, grid.embeddings, grid.offsets, outputs, *sizes, None, 0, False, 0)
    tensors = (torch.ones(4, 5, 2), inputs, grid.embeddings, grid.offsets, grads)
    backend.grid_encode_backward(*tensors, *sizes, None, None, 0, False, 0)
    torch.testing.assert_close(outputs.transpose(0, 1).flatten(1), grid(inputs * 2 - 1).detach())
    assert grads.sum().item() == pytest.approx(40, rel=1e-5)
    with pytest.raises(TypeError, match="grid_encode_forward: takes 13 to 15 arguments"):
        backend.grid_encode_forward(inputs, grid.embeddings, grid.offsets, outputs, 5, 3, 2, 4, 1.0, 3, None)
    narrow = outputs[..., :1].contiguous()
    with pytest.raises(ValueError, match=r"grid_encode_forward: outputs must have shape \[4, 5, 2\], got \[4, 5, 1\]"):
        backend.grid_encode_forward(inputs, grid.embeddings, grid.offsets, narrow, *sizes, None, 0, False, 0)


def test_compiled_regularisers() -> None:
    grid, inputs = encoder(), torch.rand(11, 3, dtype=F64)
    by_module, by_function = torch.zeros(2, *grid.embeddings.shape, dtype=F64).unbind(0)
    grid.embeddings.grad = by_module
    grid.grad_total_variation(0.1, inputs * 2 - 1)
    grid.grad_weight_decay(0.2)
    sizes = (11, 3, 2, 4, np.log2(1.7), 3, 0, False)
    backend.grad_total_variation(inputs, grid.embeddings, by_function, grid.offsets, 0.1, *sizes)
    backend.grad_weight_decay(grid.embeddings, by_function, grid.offsets, 0.2, len(by_function), 2, 4)
    torch.testing.assert_close(by_function, by_module, rtol=1e-10, atol=1e-12)


def test_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "modules", {**sys.modules})
    monkeypatch.setattr(backend, "flavour", "stable-dreamfusion")
    own = ModuleType("gridencoder")  # a project's folder, whose compiled module is missing
    sys.modules["gridencoder"] = own
    assert install(flavour="torch-ngp") == ["_gridencoder"]
    assert sys.modules["_gridencoder"] is backend
    assert sys.modules["gridencoder"] is own
    assert "gridencoder.grid" not in sys.modules
    assert GridEncoder(**SMALL).flavour == backend.flavour == "torch-ngp"
    assert install(force=True) == ["_gridencoder", "gridencoder", "gridencoder.grid"]
    assert sys.modules["gridencoder"].GridEncoder is sys.modules["gridencoder.grid"].GridEncoder is GridEncoder
    assert GridEncoder(**SMALL).flavour == "stable-dreamfusion"
    sys.modules["_gridencoder"] = own
    assert "_gridencoder" not in install()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"input_dim": 1}, ValueError, "GridEncoder: input_dim must be 2 to 5, got 1"),
        ({"level_dim": 3}, ValueError, "GridEncoder: level_dim must be 1, 2, 4, 8, 16 or 32, got 3"),
        ({"gridtype": "dense"}, ValueError, "GridEncoder: gridtype must be hash or tiled, got 'dense'"),
        (
            {"interpolation": "cubic"},
            ValueError,
            "GridEncoder: interpolation must be linear or smoothstep, got 'cubic'",
        ),
        ({"flavour": "ngp"}, ValueError, "flavour must be stable-dreamfusion or torch-ngp, got 'ngp'"),
        ({"num_levels": 2.5}, TypeError, r"GridEncoder: num_levels must be at least 1 \(an integer\), got 2.5"),
        ({"per_level_scale": 0}, ValueError, "GridEncoder: per_level_scale must be above 0, got 0"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GridEncoder(**options)


def test_wrong_inputs() -> None:
    with pytest.raises(ValueError, match=r"GridEncoder: inputs must have shape \[..., 3\], got \[5, 2\]"):
        encoder()(torch.rand(5, 2))
