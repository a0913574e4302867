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
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from dreamfusion_fast.ops.tiles.mlp import (
    MlpGradients,
    prepared_backward,
    prepared_backward_reference,
    prepared_forward,
    prepared_forward_reference,
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
    """Whether x is float32, whatever the precision. Then there is no v."""
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
    """Both passes against the twin in float64."""
    torch.manual_seed(0)
    weights, biases = network(case)
    kind = torch.float32 if case.float32_x else getattr(torch, case.precision)
    gradient_kind = torch.float32 if case.precision == "float32" else torch.bfloat16
    n, integers = case.n, case.activation == "relu"

    def numbers(columns: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        values = torch.randint(-2, 3, (n, columns)).double() if integers else torch.randn(n, columns).double()
        values = (values * scale).to(dtype)
        values[n if case.count is None else case.count :] = math.nan  # must not be read
        return values if not case.feature_major else values.t().contiguous().t()

    x, grad_y, u = numbers(case.d_in, kind), numbers(case.d_out, torch.float32, SMALL), None
    if case.second:
        u = numbers(case.d_in, gradient_kind, SMALL)
    results = []
    for twin in (False, True):
        convert = Tensor.double if twin else partial(Tensor.to, device=device)
        tensors = [None if tensor is None else convert(tensor) for tensor in (x, grad_y, u)]
        parameters = [None if p is None else [convert(q.float()) for q in p] for p in (weights, biases)]
        results.append(_passes(case, twin, *tensors, *parameters, torch.float64 if twin else gradient_kind))
    actual, expected = results
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        _assert_near(name, value.double().cpu(), expected[name], case, interpreted)


def _passes(
    case: Case,
    twin: bool,
    x: Tensor,
    grad_y: Tensor,
    u: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor] | None,
    gradient_kind: torch.dtype,
) -> dict[str, Tensor]:
    """Results of both passes over two tiles that add to the same sums: the rows that count, the others untouched."""
    counted = case.count is not None
    forward, backward = partial(prepared_forward, counted=counted), partial(prepared_backward, counted=counted)
    if twin:
        forward, backward = prepared_forward_reference, prepared_backward_reference
    arguments = (weights, biases, case.activation, case.precision)
    outputs = {"y": torch.full_like(grad_y, UNTOUCHED)}
    if not case.float32_x:
        outputs["v"] = torch.full_like(x, UNTOUCHED)
    if case.to_x:
        outputs["grad_x"] = torch.full_like(x, UNTOUCHED, dtype=gradient_kind)
    gradients = MlpGradients(weights, biases) if case.parameters else None
    for rows in (slice(0, case.n // 3), slice(case.n // 3, case.n)):
        count = None
        if case.count is not None:
            count = torch.tensor([case.count - rows.start], dtype=torch.int32, device=x.device)
        y, v, grad_x = (outputs[name][rows] if name in outputs else None for name in ("y", "v", "grad_x"))
        forward(x[rows], *arguments, y, v)(count)
        backward(x[rows], *arguments, grad_y[rows], grad_x, gradients, None if u is None else u[rows])(count)
    end = case.n if case.count is None else min(case.n, case.count)
    for name, output in outputs.items():
        assert (output[end:] == UNTOUCHED).all(), f"{name} was written beyond its rows"
    found = {name: output[:end] for name, output in outputs.items()}
    if gradients is not None:
        to_weights, to_biases = gradients.result()
        found |= {f"grad_W{i}": gradient for i, gradient in enumerate(to_weights)}
        found |= {f"grad_b{i}": gradient for i, gradient in enumerate(to_biases or [])}
    return found


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
