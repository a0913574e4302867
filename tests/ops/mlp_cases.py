"""The fused MLP's passes over buffers, checked against the twin: the same cases for torch products and for kernels.

Run as a script, it prints as JSON what went wrong in each case. That is how the kernels are tested without a GPU: with
TRITON_INTERPRET=1 in the environment Triton's interpreter runs them, but only if it is there before triton is imported.
"""

from __future__ import annotations

import json
import math
import os
import traceback
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dreamfusion_fast.ops.mlp import (
    MlpGradients,
    mlp_backward_into,
    mlp_forward_into,
    mlp_with_input_gradient_reference,
)

UNTOUCHED = -7.0
# Gradients so small that float16 would make them zero. A power of two: it changes no rounding.
SMALL = 2.0**-40
ROUNDING = {"float32": 2.0**-23, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class Case:
    """One network, one set of buffers."""

    precision: str = "float32"
    activation: str = "relu"
    layers: int = 2
    width: int = 16
    d_in: int = 19
    d_out: int = 4
    n: int = 113
    count: int | None = None
    bias: bool = True
    feature_major: bool = True
    float32_x: bool = False
    """Whether x is float32, whatever the precision."""
    second: bool = True
    """Whether v gets a gradient."""
    parameters: bool = True
    """Whether the parameters get one."""
    to_x: bool = True

    def __str__(self) -> str:
        changed = {k: v for k, v in vars(self).items() if v != getattr(Case, k)}
        return "-".join(f"{k}={v}" for k, v in changed.items()) or "default"


def cases() -> list[Case]:
    chosen = []
    for precision in ROUNDING:
        chosen += [
            Case(precision, layers=2, width=64, d_in=32, n=400),
            Case(precision, layers=1, n=1023, bias=False, feature_major=False, d_out=16),
            Case(precision, layers=4, count=50, d_out=1, d_in=5),
            Case(precision, layers=3, n=200, count=201, feature_major=False, second=False),
            Case(precision, n=0),
            Case(precision, n=1, d_in=1, float32_x=True),
            Case(precision, count=0),
            Case(precision, parameters=False, bias=False),
            Case(precision, to_x=False),
            Case(precision, "softplus", layers=1, count=100),
            Case(precision, "silu", layers=4, bias=False, feature_major=False),
            Case(precision, "silu", layers=2, width=32, second=False, parameters=False, float32_x=True),
        ]
    return [
        *chosen,
        Case("float32", "silu", layers=3, second=True, parameters=False),
        Case("float16", layers=2, width=128, d_in=100),
        Case("bfloat16", "softplus", layers=2, width=64, d_in=32),
    ]


def network(case: Case) -> tuple[list[Tensor], list[Tensor] | None]:
    """Float64 parameters. With ReLUs small integers, and halves as biases: then no product rounds, in any precision."""
    sizes = [case.d_in, *[case.width] * case.layers, case.d_out]
    weights, biases = [], []
    for inputs, outputs in pairwise(sizes):
        if case.activation == "relu":
            weight = torch.zeros(outputs, inputs, dtype=torch.float64)
            signs = torch.randint(2, (outputs, 2)).double() * 2 - 1
            weight.scatter_(1, torch.randint(inputs, (outputs, 2)), signs)
            bias = torch.randint(-2, 2, (outputs,)).double() + 0.5
        else:
            weight = torch.randn(outputs, inputs, dtype=torch.float64) * math.sqrt(2 / inputs)
            bias = torch.randn(outputs, dtype=torch.float64)
        weights.append(weight)
        biases.append(bias)
    return weights, biases if case.bias else None


def run(case: Case, device: torch.device, interpreted: bool = False) -> None:
    """Both passes in two tiles, that is two calls with the same sums, against the twin in float64."""
    torch.manual_seed(0)
    weights, biases = network(case)
    operand = getattr(torch, case.precision)
    kind = torch.float32 if case.float32_x else operand
    gradient_kind = torch.float32 if case.precision == "float32" else torch.bfloat16
    n, integers = case.n, case.activation == "relu"

    def numbers(columns: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        values = torch.randint(-2, 3, (n, columns)).double() if integers else torch.randn(n, columns).double()
        values = (values * scale).to(dtype)
        return values if not case.feature_major else values.t().contiguous().t()

    x, grad_y, u = numbers(case.d_in, kind), numbers(case.d_out, torch.float32, SMALL), None
    if case.second:
        u = numbers(case.d_in, gradient_kind, SMALL)
    end = n if case.count is None else min(n, case.count)
    expected = _expected(case, x[:end], grad_y[:end], None if u is None else u[:end], weights, biases)
    for tensor in (x, grad_y, u):
        if tensor is not None:
            tensor[end:] = math.nan  # must not be read

    parameters = [None if p is None else [q.to(device, torch.float32) for q in p] for p in (weights, biases)]
    network_arguments = (*parameters, case.activation, case.precision)
    x, grad_y, u = x.to(device), grad_y.to(device), None if u is None else u.to(device)
    y, v, grad_x = torch.empty_like(grad_y), torch.empty_like(x), torch.empty_like(x, dtype=gradient_kind)
    for output in (y, v, grad_x):
        output.fill_(UNTOUCHED)
    gradients = MlpGradients(*parameters) if case.parameters else None
    middle = n // 3
    for rows in (slice(0, middle), slice(middle, n)):
        count = None
        if case.count is not None:
            count = torch.tensor([case.count - rows.start], dtype=torch.int32, device=device)
        tile = x[rows]
        mlp_forward_into(tile, *network_arguments, y[rows], v[rows], count)
        to_x, to_v = grad_x[rows] if case.to_x else None, None if u is None else u[rows]
        mlp_backward_into(tile, *network_arguments, grad_y[rows], to_x, gradients, to_v, count)

    actual = {"y": y[:end], "v": v[:end]}
    for name, output in {**actual, "grad_x": grad_x}.items():
        written = output if name != "grad_x" else output[: end if case.to_x else 0]
        rest = {"y": y, "v": v, "grad_x": grad_x}[name][written.shape[0] :]
        assert (rest == UNTOUCHED).all(), f"{name} was written beyond its rows"
    if case.to_x:
        actual["grad_x"] = grad_x[:end]
    if gradients is not None:
        to_weights, to_biases = gradients.result()
        actual |= {f"grad_W{i}": gradient for i, gradient in enumerate(to_weights)}
        actual |= {f"grad_b{i}": gradient for i, gradient in enumerate(to_biases or [])}
    for name, value in actual.items():
        _assert_near(name, value.double().cpu(), expected[name], case, interpreted)


def _expected(
    case: Case, x: Tensor, grad_y: Tensor, u: Tensor | None, weights: list[Tensor], biases: list[Tensor] | None
) -> dict[str, Tensor]:
    x = x.double().requires_grad_()
    parameters = [p.float().double().requires_grad_() for p in (*weights, *(biases or []))]
    layers = len(weights)
    y, v = mlp_with_input_gradient_reference(x, parameters[:layers], parameters[layers:] or None, case.activation)
    outputs, seeds = ([y], [grad_y.double()]) if u is None else ([y, v], [grad_y.double(), u.double()])
    first, *rest = torch.autograd.grad(outputs, [x, *parameters], seeds, allow_unused=True, materialize_grads=True)
    expected = {"y": y.detach(), "v": v.detach(), "grad_x": first}
    expected |= {f"grad_W{i}": gradient for i, gradient in enumerate(rest[:layers])}
    return expected | {f"grad_b{i}": gradient for i, gradient in enumerate(rest[layers:])}


def _assert_near(name: str, actual: Tensor, expected: Tensor, case: Case, interpreted: bool) -> None:
    assert actual.shape == expected.shape
    if case.activation == "relu":
        assert torch.equal(actual, expected), f"{name}: off by {(actual - expected).abs().max()}"
        return
    rounding = ROUNDING[case.precision]
    if case.precision == "float16" and name.startswith("grad"):
        rounding = ROUNDING["bfloat16"]
    # Of a sum's order, float32; of each layer's weights and input, 16 bits. The interpreter cuts bfloat16 numbers off
    # where a GPU rounds them, which is twice as far.
    roundings = 8 if case.precision == "float32" else 2 * (case.layers + 1) * (2 if interpreted else 1)
    error = (actual - expected).norm() / expected.norm()
    assert error <= roundings * rounding, f"{name}: relative error {error:.2e}, {error / rounding:.1f} roundings"


def main() -> None:
    failures = {}
    for case in cases():
        try:
            run(case, torch.device("cpu"), interpreted=os.environ.get("TRITON_INTERPRET") == "1")
            failures[str(case)] = ""
        except Exception:
            failures[str(case)] = traceback.format_exc()
    print(json.dumps(failures))


if __name__ == "__main__":
    main()
