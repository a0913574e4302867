"""The interface of tiny-cuda-nn: encodings and networks against formulas of their own, in float64."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import sys
import warnings
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial
from other_grids import level_scale, tiny_cuda_nn
from torch import Tensor

from dreamfusion_fast.integrations.tinycudann import (
    Encoding,
    Network,
    NetworkWithInputEncoding,
    free_temporary_memory,
    install,
)
from dreamfusion_fast.integrations.tinycudann.network import fused_mlp

F64 = torch.float64
GRID = {"otype": "HashGrid", "n_levels": 4, "log2_hashmap_size": 7, "base_resolution": 3, "per_level_scale": 1.7}
MLP = {"otype": "FullyFusedMLP", "activation": "ReLU", "output_activation": "None", "n_neurons": 16}
SH = {"otype": "SphericalHarmonics", "degree": 3}


def filled(module: Any, device: str | torch.device = "cpu") -> Any:
    """In float64, with parameters that one sees."""
    module = module.to(device).double()
    with torch.no_grad():
        module.params.copy_(torch.randn(module.params.shape, dtype=F64))
    return module


def encoded(config: dict[str, Any], x: Tensor) -> Tensor:
    return filled(Encoding(x.shape[1], config), x.device)(x)


def grid_rows(config: dict[str, Any], dims: int, kind: str) -> list[int]:
    """The first row of each level, by tiny-cuda-nn's rule."""
    offsets = [0]
    for level in range(config["n_levels"]):
        size = level_scale(level, config["per_level_scale"], config["base_resolution"], single=True)
        rows = 8 * math.ceil((math.ceil(size - np.float32(1)) + 1) ** dims / 8)
        most = {"Hash": 2 ** config["log2_hashmap_size"], "Tiled": config["base_resolution"] ** dims}
        offsets.append(offsets[-1] + min(rows, most.get(kind, rows)))
    return offsets


@pytest.mark.parametrize("interpolation", ["Linear", "Smoothstep"])
@pytest.mark.parametrize("features", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("otype", "kind"), [("HashGrid", "Hash"), ("Grid", "Hash"), ("DenseGrid", "Dense"), ("TiledGrid", "Tiled")]
)
@pytest.mark.parametrize("dims", [2, 3, 4])
def test_grid(dims: int, otype: str, kind: str, features: int, interpolation: str, device: torch.device) -> None:
    """Of tables in the layout of tiny-cuda-nn, also at the upper border, where vertices wrap, and outside."""
    config = {**GRID, "otype": otype, "n_features_per_level": features, "interpolation": interpolation}
    grid = filled(Encoding(dims, config), device)
    offsets = grid_rows(GRID, dims, kind)
    assert grid.params.shape == (offsets[-1] * features,)
    assert grid.n_output_dims == 4 * features
    x = torch.cat([torch.rand(15, dims, dtype=F64), torch.ones(1, dims, dtype=F64), torch.zeros(1, dims, dtype=F64)])
    x = torch.cat([x, torch.rand(3, dims, dtype=F64) * 4 - 2]).to(device)
    table = grid.params.detach().cpu().view(-1, features).numpy()
    wanted = tiny_cuda_nn(x.cpu().numpy(), table, offsets, 1.7, 3, kind == "Hash", interpolation == "Smoothstep")
    assert (grid(x).cpu() - torch.from_numpy(wanted)).abs().max().item() < 1e-12
    single = Encoding(dims, config, dtype=torch.float32).to(device)
    single.load_state_dict(grid.state_dict())
    # A position is up to 30 cells from the origin, which float32 rounds to 1e-6; values are up to 4.
    assert (single(x.float()).double().cpu() - torch.from_numpy(wanted)).abs().max().item() < 5e-5


def test_grid_by_kind_and_by_features() -> None:
    x = torch.rand(7, 3, dtype=F64)
    named = encoded({**GRID, "otype": "Grid", "type": "Tiled"}, x)
    assert named.shape == (7, 8)
    assert Encoding(3, {**GRID, "otype": "Grid", "type": "Tiled"}).params.numel() == 2 * 4 * 27
    counted = {key: value for key, value in GRID.items() if key != "n_levels"}
    assert Encoding(3, {**counted, "n_features": 12, "n_features_per_level": 4}).n_output_dims == 12


def harmonic(degree: int, order: int, x: np.ndarray) -> np.ndarray:
    """By the formula of Rodrigues, with exact derivatives of polynomials."""
    m = abs(order)
    legendre = Polynomial([-1, 0, 1]) ** degree
    legendre = legendre.deriv(degree + m) if degree + m else legendre
    azimuth = (x[:, 0] + 1j * x[:, 1]) ** m
    part = azimuth.imag if order < 0 else azimuth.real
    norm = math.sqrt((2 * degree + 1) / (4 * math.pi) * math.factorial(degree - m) / math.factorial(degree + m))
    norm *= (math.sqrt(2) if m else 1) * (-1) ** m / (2**degree * math.factorial(degree))
    return norm * legendre(x[:, 2]) * part


@pytest.mark.parametrize("degree", range(1, 9))
def test_spherical_harmonics(degree: int, device: torch.device) -> None:
    x = torch.rand(31, 3, dtype=F64, device=device)
    direction = 2 * x.cpu().numpy() - 1
    wanted = [harmonic(n, m, direction) for n in range(degree) for m in range(-n, n + 1)]
    actual = encoded({"otype": "SphericalHarmonics", "degree": degree}, x)
    assert actual.shape == (31, degree**2)
    np.testing.assert_allclose(actual.cpu().numpy(), np.stack(wanted, 1), rtol=0, atol=1e-12 * 4**degree)


def test_spherical_harmonics_of_low_degrees() -> None:
    """Signs and order, as everyone writes them."""
    x, y, z = np.array([0.48, -0.6, 0.64])
    wanted = [0.28209479177387814, -0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x]
    wanted += [1.0925484305920792 * x * y, -1.0925484305920792 * y * z, 0.31539156525252005 * (3 * z * z - 1)]
    wanted += [-1.0925484305920792 * x * z, 0.5462742152960396 * (x * x - y * y)]
    actual = encoded(SH, (torch.tensor([[x, y, z]], dtype=F64) + 1) / 2)
    np.testing.assert_allclose(actual[0].numpy(), wanted, rtol=1e-12)


def test_frequency(device: torch.device) -> None:
    x = torch.rand(9, 2, dtype=F64, device=device)
    wanted = [
        [f(2**k * math.pi * c) for c in row for k in range(5) for f in (math.sin, math.cos)] for row in x.tolist()
    ]
    actual = encoded({"otype": "Frequency", "n_frequencies": 5}, x)
    torch.testing.assert_close(actual.cpu(), torch.tensor(wanted, dtype=F64), rtol=0, atol=1e-13)
    assert Encoding(2, {"otype": "Frequency"}).n_output_dims == 48


@pytest.mark.parametrize("bins", [1, 4, 16])
def test_one_blob(bins: int, device: torch.device) -> None:
    """The kernel's integral over each bin, and over those one period away."""
    kernel = 15 / 16 * Polynomial([1, 0, -1]) ** 2
    integral = kernel.integ()
    x = torch.rand(9, 2, dtype=F64, device=device)
    wanted = np.zeros((9, 2, bins))
    for (i, j), k, turn in itertools.product(np.ndindex(9, 2), range(bins), (-1, 0, 1)):
        low, high = (np.clip(k + step + bins * (turn - x[i, j].item()), -1, 1) for step in (0, 1))
        wanted[i, j, k] += integral(high) - integral(low)
    actual = encoded({"otype": "OneBlob", "n_bins": bins}, x)
    np.testing.assert_allclose(actual.cpu().numpy(), wanted.reshape(9, -1), rtol=0, atol=1e-13)
    torch.testing.assert_close(actual.view(9, 2, bins).sum(2), torch.ones_like(x))  # it is a density on a circle


def test_identity() -> None:
    x = torch.rand(5, 3, dtype=F64)
    assert torch.equal(encoded({"otype": "identity"}, x), x)
    assert torch.equal(encoded({"otype": "Identity", "scale": 2, "offset": -1.0}, x), x * 2 - 1)


def test_composite() -> None:
    """Ranges of inputs; a grid begins at a multiple of its features, and harmonics are filled up in front."""
    x = torch.rand(5, 7, dtype=F64)
    grid = {**GRID, "n_features_per_level": 4}
    nested = [{**SH, "n_dims_to_encode": 3}, {**grid, "n_dims_to_encode": 3}, {"otype": "Identity"}]
    whole = filled(Encoding(7, {"otype": "Composite", "nested": nested}))
    result = whole(x)
    assert whole.n_output_dims == 12 + 16 + 1
    assert torch.equal(result[:, :3], torch.ones(5, 3, dtype=F64))
    torch.testing.assert_close(result[:, 3:12], encoded(SH, x[:, :3]))
    alone = Encoding(3, grid).double()
    alone.load_state_dict(whole.state_dict())
    assert torch.equal(result[:, 12:28], alone(x[:, 3:6]))
    assert torch.equal(result[:, 28:], x[:, 6:])

    same = [{"otype": "Identity", "n_dims_to_encode": 2, "dims_to_encode_begin": begin} for begin in (0, 3, 5)]
    parts = torch.stack([x[:, 0:2], x[:, 3:5], x[:, 5:7]])
    for reduction, wanted in (("Sum", parts.sum(0)), ("Product", parts.prod(0))):
        torch.testing.assert_close(encoded({"otype": "Composite", "nested": same, "reduction": reduction}, x), wanted)
    deep = {"otype": "Composite", "nested": [{"otype": "Composite", "nested": same}]}
    assert torch.equal(encoded(deep, x), torch.cat(list(parts), 1))


ACTIVATIONS = {
    "None": lambda x: x,
    "ReLU": lambda x: np.maximum(x, 0),
    "LeakyReLU": lambda x: np.where(x > 0, x, 0.01 * x),
    "Exponential": np.exp,
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Sine": np.sin,
    "Squareplus": lambda x: (10 * x + np.sqrt(100 * x * x + 4)) / 20,
    "Softplus": lambda x: np.log1p(np.exp(10 * x)) / 10,
    "Tanh": np.tanh,
    "SiLU": lambda x: x / (1 + np.exp(-x)),
}


@pytest.mark.parametrize("otype", ["FullyFusedMLP", "CutlassMLP"])
@pytest.mark.parametrize("hidden", [1, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_network(activation: str, hidden: int, otype: str, device: torch.device) -> None:
    """Matrices row by row in one tensor, inputs filled up with ones, results with rows that are not seen."""
    config = {"otype": otype, "n_neurons": 32, "n_hidden_layers": hidden, "activation": activation}
    network = filled(Network(5, 3, {**config, "output_activation": "Sigmoid"}), device)
    with torch.no_grad():
        network.params.mul_(0.2)
    x = torch.randn(17, 5, dtype=F64, device=device)
    shapes = [(32, 16), *[(32, 32)] * (hidden - 1), (16, 32)]
    assert network.params.numel() == sum(rows * columns for rows, columns in shapes)
    y, begin, flat = np.ones((17, 16)), 0, network.params.detach().cpu().numpy()
    y[:, :5] = x.cpu().numpy()
    for layer, (rows, columns) in enumerate(shapes):
        weight = flat[begin : begin + rows * columns].reshape(rows, columns)
        begin += rows * columns
        y = ACTIVATIONS["Sigmoid" if layer == hidden else activation](y @ weight.T)
    np.testing.assert_allclose(network(x).detach().cpu().numpy(), y[:, :3], rtol=1e-11, atol=1e-12)


def test_network_without_hidden_layers() -> None:
    network = filled(Network(16, 20, {"otype": "CutlassMLP", "n_hidden_layers": 0}))
    x = torch.randn(4, 16, dtype=F64)
    assert network.params.numel() == 32 * 16
    torch.testing.assert_close(network(x), x @ network.params.view(32, 16)[:20].T)


def test_network_with_input_encoding() -> None:
    """The network's parameters come first; harmonics have their ones in front, a grid its zeros behind."""
    config = {**MLP, "n_hidden_layers": 2}
    for encoding, n_pad in ((SH, 7), ({**GRID, "n_levels": 3}, 10)):
        both = filled(NetworkWithInputEncoding(3, 4, encoding, config))
        n_network = 3 * 16 * 16
        alone = Encoding(3, encoding).double()
        alone.load_state_dict({"params": both.params.detach()[n_network:]})
        x = torch.rand(6, 3, dtype=F64)
        inputs = alone(x)
        if encoding is SH:
            inputs = torch.cat([torch.ones(6, n_pad, dtype=F64), inputs], 1)
        else:
            inputs = torch.cat([inputs, torch.zeros(6, n_pad, dtype=F64)], 1)
        network = Network(16, 4, config).double()
        network.load_state_dict({"params": both.params.detach()[:n_network]})
        torch.testing.assert_close(both(x), network(inputs))
        assert list(both.state_dict()) == ["params"]


@pytest.mark.parametrize("batch", [0, 1, 113, 257])
def test_any_batch(batch: int, device: torch.device) -> None:
    model = NetworkWithInputEncoding(3, 4, GRID, {**MLP, "n_hidden_layers": 2}).to(device)
    x = torch.rand(batch, 6, device=device)[:, ::2].requires_grad_()
    y = model(x)
    assert y.shape == (batch, 4)
    (gradient,) = torch.autograd.grad(y.float().sum(), x)
    assert gradient.shape == x.shape


SMOOTH = {**MLP, "activation": "Softplus", "output_activation": "Tanh", "n_hidden_layers": 2}


@pytest.mark.parametrize(
    ("encoding", "dims"),
    [
        ({**GRID, "n_levels": 2, "log2_hashmap_size": 3, "interpolation": "Smoothstep"}, 3),
        ({**GRID, "n_levels": 2, "log2_hashmap_size": 3}, 2),
        (SH, 3),
        ({"otype": "Frequency", "n_frequencies": 2}, 1),
        ({"otype": "OneBlob", "n_bins": 4}, 2),
        ({"otype": "Composite", "nested": [{**SH, "n_dims_to_encode": 3}, {"otype": "OneBlob", "n_bins": 4}]}, 4),
    ],
    ids=lambda x: str(x["otype"]) if isinstance(x, dict) else "",
)
def test_first_and_second_derivatives(encoding: dict[str, Any], dims: int) -> None:
    """To inputs and parameters, through encoding and network."""
    model = filled(NetworkWithInputEncoding(dims, 1, encoding, {**SMOOTH, "n_hidden_layers": 1}))
    with torch.no_grad():
        model.params.mul_(0.3)
    x = (torch.rand(2, dims, dtype=F64) * 0.8 + 0.1).requires_grad_()
    some = torch.randperm(model.params.numel())[:24]

    def run(x: Tensor, few: Tensor) -> Tensor:
        params = model.params.detach().index_put((some,), few)
        return torch.func.functional_call(model, {"params": params}, (x,))

    few = model.params.detach()[some].requires_grad_()
    assert torch.autograd.gradcheck(run, (x, few))
    assert torch.autograd.gradgradcheck(run, (x, few))


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_fused_network_can_be_differentiated_twice(activation: str, device: torch.device) -> None:
    shapes = [(8, 4), (8, 8), (3, 8)]
    weights = [torch.randn(shape, dtype=F64, device=device).requires_grad_() for shape in shapes]
    x = torch.randn(3, 4, dtype=F64, device=device).requires_grad_()

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return fused_mlp(x, weights, activation, "float32")

    assert torch.autograd.gradcheck(run, (x, *weights))
    assert torch.autograd.gradgradcheck(run, (x, *weights))
    frozen = [weights[0].detach(), *weights[1:]]
    run(x.detach(), *frozen).sum().backward()  # of some of them alone
    assert x.grad is None
    assert all(weight.grad is not None for weight in weights[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 113, 1023])
@pytest.mark.parametrize("activation", ["ReLU", "SiLU"])
def test_grid_and_mlp_in_one_piece(activation: str, count: int) -> None:
    """As one after the other, and small gradients are not lost on the way."""
    config = {**MLP, "n_neurons": 64, "n_hidden_layers": 2, "activation": activation}
    model = NetworkWithInputEncoding(3, 4, {**GRID, "n_levels": 16}, config)
    with torch.no_grad():
        model.params[-model._encoding.n_params :].mul_(1e4)
    x = torch.rand(count, 3, device="cuda")
    results = []
    for points in (x, x.clone().requires_grad_()):  # whose gradient goes another way
        y = model(points)
        (gradient,) = torch.autograd.grad(y.float().sum(), model.params)
        (small,) = torch.autograd.grad((1e-6 * model(points).float()).sum(), model.params)
        results.append((y, gradient, 1e6 * small))
    (y, gradient, small), (wanted, wanted_gradient, _) = results
    assert (y - wanted).abs().max().item() < 0.01 * wanted.abs().max().item()
    for found in (gradient, small):
        assert (found - wanted_gradient).norm().item() < 0.02 * wanted_gradient.norm().item()
    (first,) = torch.autograd.grad(model(x).float().square().sum(), model.params, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), model.params)
    y = model(x.clone().requires_grad_())
    (first,) = torch.autograd.grad(y.float().square().sum(), model.params, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), model.params)
    assert (second - expected).norm().item() < 0.02 * expected.norm().item()
    assert model(x[:0]).shape == (0, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["ReLU", "SiLU", "Softplus"])
def test_half_results_on_a_gpu(activation: str) -> None:
    config = {**MLP, "n_neurons": 64, "n_hidden_layers": 2, "activation": activation}
    model = NetworkWithInputEncoding(3, 16, {**GRID, "n_levels": 16}, config)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        exact.params[-model._encoding.n_params :].mul_(1e4)
        model.params.copy_(exact.params)
    assert (model.params.device.type, model.dtype, model.loss_scale) == ("cuda", torch.float16, 128.0)
    x = torch.rand(1023, 3, device="cuda").requires_grad_()
    y, wanted = model(x), exact(x.double())
    assert y.dtype == torch.float16
    assert (y - wanted).abs().max().item() < 0.01 * wanted.abs().max().item()
    normals, wanted_normals = (
        torch.autograd.grad(z[:, 0].double().sum(), x, create_graph=True)[0] for z in (y, wanted)
    )
    # Where rounding flips a ReLU, a gradient jumps.
    off = (normals - wanted_normals).abs() > 0.02 * wanted_normals.abs().max()
    assert off.float().mean().item() < 0.01
    second, wanted_second = (
        torch.autograd.grad(n.square().sum(), m.params)[0] for n, m in ((normals, model), (wanted_normals, exact))
    )
    assert (second - wanted_second).norm().item() < 0.05 * wanted_second.norm().item()
    encoding = Encoding(3, GRID, dtype=torch.float32)
    assert encoding(x).dtype == torch.float32
    assert Encoding(3, GRID)(x).dtype == torch.float16
    assert model(x.cpu()).device.type == "cuda"


def test_first_parameters() -> None:
    """Uniform within the bounds of tiny-cuda-nn, and the same for a seed."""
    grid = Encoding(3, {**GRID, "log2_hashmap_size": 14}, seed=3)
    assert grid.params.dtype == torch.float32
    assert 0.99e-4 < grid.params.max().item() <= 1e-4
    assert -1e-4 <= grid.params.min().item() < -0.99e-4
    assert abs(grid.params.mean().item()) < 2e-6
    assert torch.equal(grid.params, Encoding(3, {**GRID, "log2_hashmap_size": 14}, seed=3).params)
    assert not torch.equal(grid.params, Encoding(3, {**GRID, "log2_hashmap_size": 14}, seed=4).params)
    network = Network(32, 16, {**MLP, "n_neurons": 64, "n_hidden_layers": 2})
    for part, fans in zip(network.params.split([64 * 32, 64 * 64, 16 * 64]), (96, 128, 80), strict=True):
        bound = math.sqrt(6 / fans)
        assert 0.98 * bound < part.abs().max().item() <= bound
        assert part.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert Encoding(3, SH).params.shape == (0,)


def test_on_a_cpu_everything_is_float32() -> None:
    for model in (Encoding(3, GRID, dtype=torch.float16), Network(3, 2, {**MLP, "n_hidden_layers": 1})):
        model = model.cpu()
        assert (model.dtype, model.loss_scale) == (torch.float32, 1.0)
        assert model(torch.rand(4, 3)).dtype == torch.float32
        assert model(torch.rand(4, 3).half()).dtype == torch.float32
    free_temporary_memory()


def test_autocast_changes_nothing(device: torch.device) -> None:
    model = NetworkWithInputEncoding(3, 4, GRID, {**MLP, "n_hidden_layers": 2, "activation": "Tanh"}).to(device)
    x = torch.rand(5, 3, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = model(x)
    assert torch.equal(inside, model(x))


def test_copies() -> None:
    model = NetworkWithInputEncoding(3, 4, GRID, {**MLP, "n_hidden_layers": 2}).cpu()
    x = torch.rand(5, 3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    assert "n_input_dims=3, n_output_dims=4" in repr(model)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Encoding(3, "HashGrid"), TypeError, "Encoding: config must be a dictionary, got 'HashGrid'"),
        (lambda: Encoding(3, {"otype": "Hash"}), ValueError, "Encoding: otype must be Composite, .*, got 'Hash'"),
        (lambda: Encoding(2, SH), ValueError, "Encoding SphericalHarmonics: takes 3 inputs, got 2"),
        (lambda: Encoding(3, {**SH, "degree": 9}), ValueError, "degree must be between 1 and 8, got 9"),
        (lambda: Encoding(5, GRID), ValueError, "Encoding HashGrid: takes 2, 3 or 4 inputs, got 5"),
        (
            lambda: Encoding(3, {**GRID, "interpolation": "Nearest"}),
            ValueError,
            "must be Linear, Smoothstep, got 'Near",
        ),
        (lambda: Encoding(3, {**GRID, "hash": "Rng"}), ValueError, "hash must be CoherentPrime, got 'Rng'"),
        (lambda: Encoding(3, {**GRID, "n_features": 8}), ValueError, "n_features and n_levels say the same"),
        (lambda: Encoding(3, {**GRID, "stochastic_interpolation": True}), ValueError, "must be False, got True"),
        (lambda: Encoding(3, {"otype": "OneBlob", "n_bins": 3}), ValueError, "n_bins must be a power of two"),
        (lambda: Encoding(3, {"otype": "Composite"}), TypeError, "nested must be a list of dictionaries, got None"),
        (lambda: Encoding(3, GRID, dtype=F64), ValueError, "dtype must be None, torch.float16 or torch.float32"),
        (lambda: Encoding(0, GRID), ValueError, "Encoding: n_input_dims must be at least 1, got 0"),
        (lambda: Network(3, 4, {"otype": "ResNet"}), ValueError, "Network: otype must be FullyFusedMLP, CutlassMLP or"),
        (
            lambda: Network(3, 4, {**MLP, "n_neurons": 48}),
            ValueError,
            "n_neurons must be 16, 32, 64, 128 or 256, got 48",
        ),
        (lambda: Network(3, 4, {**MLP, "activation": "GELU"}), ValueError, "activation must be None, .*, got 'GELU'"),
        (lambda: Network(3, 4, {**MLP, "n_hidden_layers": 0}), ValueError, "n_hidden_layers must be at least 1, got 0"),
        (lambda: Encoding(3, GRID)(torch.rand(4, 2)), ValueError, r"x must have shape \[n, 3\], got \[4, 2\]"),
        (
            lambda: Encoding(3, GRID)(torch.ones(4, 3, dtype=torch.int64)),
            TypeError,
            "x must be a tensor of floats, got",
        ),
    ],
)
def test_wrong_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_wrong_ranges() -> None:
    whole = {"otype": "Identity"}
    for nested, message in (
        ([whole, whole], "n_dims_to_encode must be given, but for one"),
        ([{**whole, "n_dims_to_encode": 4}], "nested must encode inputs 0 to 3, got 0 to 4"),
        ([{**whole, "n_dims_to_encode": 1, "dims_to_encode_begin": 3}], "nested must encode inputs 0 to 3, got 3 to 4"),
    ):
        with pytest.raises(ValueError, match=message):
            Encoding(3, {"otype": "Composite", "nested": nested})


def test_unknown_options_warn_once() -> None:
    with pytest.warns(UserWarning, match="Encoding Identity: option wheels is unknown and ignored"):
        Encoding(3, {"otype": "Identity", "wheels": 4})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Encoding(3, {"otype": "Identity", "wheels": 4})


def test_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "modules", {**sys.modules})
    theirs = ModuleType("tinycudann")
    sys.modules["tinycudann"] = theirs
    assert not install()
    assert sys.modules["tinycudann"] is theirs
    assert install(force=True)
    assert sys.modules["tinycudann"].Encoding is Encoding
    assert sys.modules["tinycudann.modules"].NetworkWithInputEncoding is NetworkWithInputEncoding
    assert install()
