"""Fused MLP: the two ops against their twins; `tiles/test_mlp_tile.py` has the passes that they are made of."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from itertools import pairwise

import pytest
import torch
from interpreting import needs_triton
from torch import Tensor

from dreamfusion_fast.ops import _mlp_launch, _triton
from dreamfusion_fast.ops._triton import triton_reason, triton_serves
from dreamfusion_fast.ops.mlp import (
    mlp,
    mlp_reference,
    mlp_with_input_gradient,
    mlp_with_input_gradient_reference,
)

CPU = torch.device("cpu")
ACTIVATIONS = ["relu", "softplus", "silu"]


def network(
    sizes: list[int], device: torch.device = CPU, dtype: torch.dtype = torch.float64, bias: bool = True
) -> tuple[list[Tensor], list[Tensor] | None]:
    weights = [torch.randn(b, a, dtype=torch.float64) / a**0.5 for a, b in pairwise(sizes)]
    biases = [torch.randn(size, dtype=torch.float64) for size in sizes[1:]]
    return [w.to(device, dtype) for w in weights], [b.to(device, dtype) for b in biases] if bias else None


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_finite_differences(activation: str, bias: bool) -> None:
    """Of y and v, so second derivatives of the network with it."""
    weights, biases = network([3, 6, 5, 2], bias=bias)
    x = torch.randn(4, 3, dtype=torch.float64).requires_grad_()
    parameters = [p.requires_grad_() for p in (*weights, *(biases or []))]

    def both(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return mlp_with_input_gradient(x, parameters[:3], parameters[3:] or None, activation)

    def only_y(x: Tensor, *parameters: Tensor) -> Tensor:
        return mlp(x, parameters[:3], parameters[3:] or None, activation)

    assert torch.autograd.gradcheck(both, (x, *parameters))
    assert torch.autograd.gradcheck(only_y, (x, *parameters))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_twin_can_be_differentiated_again(activation: str) -> None:
    weights, biases = network([3, 4, 2])
    x = torch.randn(3, 3, dtype=torch.float64).requires_grad_()
    parameters = [p.requires_grad_() for p in (*weights, *biases)]

    def both(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return mlp_with_input_gradient_reference(x, parameters[:2], parameters[2:], activation)

    assert torch.autograd.gradgradcheck(both, (x, *parameters))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("n", [0, 1, 113, 1023])
def test_ops_match_the_twin(n: int, precision: str, bias: bool, device: torch.device) -> None:
    """Through autograd, with a smooth activation, whose derivatives do not jump where an argument is rounded."""
    weights, biases = network([7, 32, 32, 3], device, torch.float32, bias)
    x = torch.randn(n, 7, device=device).to(getattr(torch, precision))
    seeds = torch.randn(n, 3, device=device), torch.randn(n, 7, device=device).to(x.dtype)
    results = []
    for double in (False, True):
        convert = (
            (lambda t: t.detach().double().requires_grad_()) if double else (lambda t: t.detach().requires_grad_())
        )
        leaves = [convert(t) for t in (x, *weights, *(biases or []))]
        arguments = (leaves[0], leaves[1:4], leaves[4:] or None, "softplus")
        if double:
            outputs = mlp_with_input_gradient_reference(*arguments)
        else:
            outputs = mlp_with_input_gradient(*arguments, precision)
            assert torch.equal(mlp(*arguments, precision), outputs[0])
            assert [out.dtype for out in outputs] == [torch.float32, x.dtype]
        gradients = torch.autograd.grad(
            outputs, leaves, [s.to(out.dtype) for s, out in zip(seeds, outputs, strict=True)],
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        results.append([*outputs, *gradients])
    tolerance = 1e-6 if precision == "float32" else 6 * 2.0**-8
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape
        if expected.norm() == 0:
            assert not actual.any()
        else:
            assert relative_error(actual, expected) < tolerance


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_wide_input_is_rounded_to_the_precision(precision: str, device: torch.device) -> None:
    """And v, which is stored in the operands' type, comes back in that of x."""
    weights, biases = network([7, 32, 32, 3], device, torch.float32)
    x = torch.randn(113, 7, device=device)
    y, v = mlp_with_input_gradient(x, weights, biases, "silu", precision)
    expected = mlp_with_input_gradient(x.to(getattr(torch, precision)), weights, biases, "silu", precision)
    assert v.dtype == torch.float32
    assert torch.equal(y, expected[0])
    assert torch.equal(v, expected[1].float())
    assert torch.equal(mlp(x, weights, biases, "silu", precision), y)


def test_gradients_of_some_inputs_only(device: torch.device) -> None:
    weights, biases = network([5, 16, 16, 2], device, torch.float32)
    x = torch.randn(113, 5, device=device)
    leaves = [t.clone().requires_grad_() for t in (x, *weights, *biases)]
    seeds = torch.randn(113, 2, device=device), torch.randn(113, 5, device=device)
    outputs = mlp_with_input_gradient(leaves[0], leaves[1:4], leaves[4:])
    wanted = torch.autograd.grad(outputs, leaves, seeds)
    for i, leaf in enumerate((x, *weights, *biases)):
        inputs = [t.detach() for t in (x, *weights, *biases)]
        inputs[i] = leaf.clone().requires_grad_()
        (actual,) = torch.autograd.grad(mlp_with_input_gradient(inputs[0], inputs[1:4], inputs[4:]), inputs[i], seeds)
        assert torch.equal(actual, wanted[i])


def test_gradient_of_v_alone(device: torch.device) -> None:
    weights, biases = network([5, 16, 2], device, torch.float32)
    x = torch.randn(113, 5, device=device)
    results = []
    for function in (mlp_with_input_gradient, mlp_with_input_gradient_reference):
        leaves = [t.clone().requires_grad_() for t in (x, *weights)]
        v = function(leaves[0], leaves[1:], biases, "silu")[1]
        results.append(torch.autograd.grad(v.square().sum(), leaves))
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 1e-6


def test_any_network_runs(device: torch.device) -> None:
    """Hidden layers of different and of odd widths, more than four of them, more outputs than a kernel has."""
    weights, biases = network([130, 7, 33, 16, 16, 16, 20], device, torch.float32)
    x = torch.randn(113, 130, device=device)
    assert not _mlp_launch.kernels_serve(device, weights)
    assert relative_error(mlp(x, weights, biases), mlp_reference(x, weights, biases)) < 1e-6


def test_strided_parameters(device: torch.device) -> None:
    """A field that reads some of its levels passes a part of the first layer's columns."""
    weights, biases = network([12, 16, 2], device, torch.float32)
    x = torch.randn(113, 6, device=device)
    columns = [weights[0][:, :6].requires_grad_(), weights[1].t().contiguous().t()]
    copies = [columns[0].detach().contiguous().requires_grad_(), weights[1]]
    results = []
    for chosen in (columns, copies):
        y = mlp(x, chosen, biases)
        results.append((y, *torch.autograd.grad(y.square().sum(), chosen[0])))
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 1e-6


def test_nan_stays_in_its_row(device: torch.device) -> None:
    weights, biases = network([5, 16, 16, 2], device, torch.float32)
    x = torch.randn(113, 5, device=device)
    x[7, 2] = torch.nan
    y = mlp(x, weights, biases)
    assert y.isnan().any(1).nonzero().flatten().tolist() == [7]


def test_second_derivative_is_an_error_and_not_zero(device: torch.device) -> None:
    weights, biases = network([5, 16, 2], device, torch.float32)
    x = torch.randn(3, 5, device=device).requires_grad_()
    (gradient,) = torch.autograd.grad(mlp(x, weights, biases).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.sum().backward()


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias: bool, device: torch.device) -> None:
    weights, biases = network([5, 16, 2], device, torch.float32, bias)
    x = torch.randn(9, 5, device=device)
    leaves = [t.requires_grad_() for t in (x.clone(), *weights, *(biases or []))]
    ops = torch.ops.dreamfusion_fast
    for op in (ops.mlp, ops.mlp_with_input_gradient):
        torch.library.opcheck(op.default, (leaves[0], leaves[1:3], leaves[3:], "silu", "float32"))
    parameters = [leaf.detach() for leaf in leaves[1:]]
    grad_y, u = torch.randn(9, 2, device=device), torch.randn(9, 5, device=device)
    for seeds in ((grad_y, u, True, True), (grad_y, None, False, True), (grad_y, u, True, False)):
        torch.library.opcheck(ops.mlp_backward.default, (x, parameters[:2], parameters[2:], "silu", "float32", *seeds))


def test_reason_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert triton_reason("cpu") != ""
    assert not triton_serves("cpu")
    assert triton_reason("meta") != ""


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "triton is not installed"),
        ("3.3.1", "triton 3.3.1 is older than 3.4"),
        ("2.10", "triton 2.10 is older than 3.4"),
        ("3.4.0", ""),
        ("3.10.0+git1", ""),
    ],
)
def test_reason_says_which_triton_does_not_serve(
    monkeypatch: pytest.MonkeyPatch, version: str | None, reason: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: version)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    said = _triton.version_reason.__wrapped__()
    assert said.startswith(reason)
    assert (said == "") == (reason == "")


@needs_triton
def test_the_interpreter_serves_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_serves("cpu")


def wrong_arguments() -> list[tuple[dict[str, object], type[Exception], str]]:
    weights, biases = network([3, 16, 2], dtype=torch.float32)
    return [
        ({"x": torch.rand(4, 2)}, ValueError, r"x must have shape \[n, 3\], got \[4, 2\]"),
        ({"x": torch.rand(4, 3).half()}, TypeError, "x must be torch.float32, got torch.float16"),
        ({"x": torch.rand(4, 3).half(), "precision": "bfloat16"}, TypeError, "x must be torch.float32 or torch.bfl"),
        ({"x": torch.rand(4, 3, device="meta")}, ValueError, "x is on meta"),
        ({"weights": weights[:1], "biases": None}, ValueError, "at least two layers, got 1"),
        ({"weights": [weights[0], torch.rand(2, 15)]}, ValueError, r"weights\[1\] must have shape \[out, 16\]"),
        ({"weights": [weights[0], weights[1].double()]}, TypeError, r"weights\[1\] must be torch.float32"),
        ({"weights": [w.half() for w in weights]}, TypeError, r"weights\[0\] must be torch.float32 or torch.float64"),
        ({"biases": biases[:1]}, ValueError, "biases must be as many as weights, 2, or None, got 1"),
        ({"biases": [biases[0], torch.rand(3)]}, ValueError, r"biases\[1\] must have shape \[2\], got \[3\]"),
        ({"activation": "tanh"}, ValueError, "activation must be relu, softplus, silu, got 'tanh'"),
        ({"precision": "half"}, ValueError, "precision must be float32, float16, bfloat16, got 'half'"),
        (
            {"weights": [w.double() for w in weights], "biases": None, "precision": "float16"},
            ValueError,
            "precision must be float32 where parameters are float64",
        ),
    ]


@pytest.mark.parametrize(
    ("change", "error", "message"), wrong_arguments(), ids=lambda x: x if isinstance(x, str) else ""
)
def test_wrong_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    weights, biases = network([3, 16, 2], dtype=torch.float32)
    arguments = {"x": torch.rand(4, 3), "weights": weights, "biases": biases, **change}
    for function in (mlp, mlp_with_input_gradient):
        with pytest.raises(error, match=message):
            function(**arguments)  # type: ignore[arg-type]
