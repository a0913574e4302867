"""The fused MLP's passes as torch products, where its kernels do not run: on a CPU, in float64, on older GPUs.

The formulas are those of `dreamfusion_fast.ops.mlp`, whose notation this has; a row of x is a sample. In 16-bit
precision the forward products are rounded as torch rounds them, and products with a gradient are float32: a CPU or an
older GPU has no faster type that small gradients fit into. `_mlp_triton` has the same passes as kernels, and
tests/ops/test_mlp.py holds both to the twin.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# A CPU takes so many samples at a time, whose hidden layers then stay in its caches: of 85 000 samples of the main job
# (16 inputs, 32 hidden), backward takes 6.6 ms in place of 7.4, on two otherwise idle cores.
_ROWS_ON_CPU = 1 << 14

OPERANDS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Network(NamedTuple):
    """A network and how it is computed; `dreamfusion_fast.ops.mlp.mlp` has the meaning of each."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor] | None
    activation: str
    precision: str

    @property
    def operand(self) -> torch.dtype:
        """The type of the products' operands."""
        return torch.float64 if self.weights[0].dtype == torch.float64 else OPERANDS[self.precision]


def forward(x: Tensor, network: Network, y: Tensor, v: Tensor | None) -> None:
    """Writes y and, unless it is None, v."""
    (weights, biases, activation, _), operand = network, network.operand
    blocks = _blocks(x, y, v)
    for x, y, v in blocks:
        kept, h = _hidden_layers(x, network, keep=v is not None)
        _linear_into(h, weights[-1].to(operand), None if biases is None else biases[-1].to(operand), y)
        if v is None:
            continue
        q = weights[-1][:1].to(operand)
        for k, weight in zip(reversed(kept), reversed(weights[1:-1]), strict=False):
            q = _times_slope(q, k, activation) @ weight.to(operand)
        _linear_into(_times_slope(q, kept[0], activation), weights[0].to(operand).t(), None, v)


def backward(
    x: Tensor,
    network: Network,
    grad_y: Tensor,
    u: Tensor | None,
    grad_x: Tensor | None,
    weight_sums: Sequence[Tensor] | None,
    bias_sums: Sequence[Tensor] | None,
) -> None:
    """Writes grad_x and adds to the sums of the weights' and biases' gradients; each of them may be None."""
    weights, activation, gradient = network.weights, network.activation, network.weights[0].dtype
    blocks = _blocks(x, grad_y, u, grad_x)
    for x, grad_y, u, grad_x in blocks:
        kept, _ = _hidden_layers(x, network, keep=True)
        kept = [k.to(gradient) for k in kept]
        bends: list[Tensor | None] = [None] * len(kept)
        if u is not None and (weight_sums is not None or activation != "relu"):
            bends = _second_order(u.to(gradient), weights, activation, kept, weight_sums)
        g = grad_y.to(gradient)
        for layer in range(len(weights) - 1, -1, -1):
            if weight_sums is not None:
                h = x.to(network.operand).to(gradient) if layer == 0 else _activate(kept[layer - 1], activation)
                weight_sums[layer].addmm_(g.t(), h)
                if bias_sums is not None:
                    bias_sums[layer].add_(g.sum(0))
            if layer > 0:
                g = _times_slope(g @ weights[layer], kept[layer - 1], activation)
                bend = bends[layer - 1]
                if bend is not None:
                    g += bend
            elif grad_x is not None:
                _linear_into(g, weights[0].t(), None, grad_x)


def _blocks(x: Tensor, *others: Any) -> Iterator[tuple[Any, ...]]:
    """Tensors of as many rows each (None stays None), a block of rows after the other."""
    step = _ROWS_ON_CPU if x.device.type == "cpu" else max(len(x), 1)
    for first in range(0, len(x), step):
        rows = slice(first, first + step)
        yield tuple(None if tensor is None else tensor[rows] for tensor in (x, *others))


def _second_order(
    u: Tensor, weights: Sequence[Tensor], activation: str, kept: Sequence[Tensor], weight_sums: Sequence[Tensor] | None
) -> list[Tensor | None]:
    """Adds what u sends to the weights to their sums, and returns what it adds to each dz: nothing with ReLUs."""
    q = [weights[-1][:1]]
    for k, weight in zip(reversed(kept[1:]), reversed(weights[1:-1]), strict=True):
        q.insert(0, _times_slope(q[0], k, activation) @ weight)
    bends: list[Tensor | None] = []
    d = u
    for layer, k in enumerate(kept):
        if weight_sums is not None:
            weight_sums[layer].addmm_(_times_slope(q[layer], k, activation).t(), d)
        dp = d @ weights[layer].t()
        bends.append(None if activation == "relu" else _curvature(k, activation).mul_(q[layer]).mul_(dp))
        d = _times_slope(dp, k, activation)
    if weight_sums is not None:
        weight_sums[-1][0].add_(d.sum(0))
    return bends


def _hidden_layers(x: Tensor, network: Network, keep: bool) -> tuple[list[Tensor], Tensor]:
    """The last hidden layer's output, and, if they are to be kept, the inputs of each hidden layer's derivatives: a
    ReLU's output, a smooth activation's argument."""
    (weights, biases, activation, _), operand = network, network.operand
    kept: list[Tensor] = []
    h = x.to(operand)
    for layer, weight in enumerate(weights[:-1]):
        z = F.linear(h, weight.to(operand), None if biases is None else biases[layer].to(operand))
        h = z.relu_() if activation == "relu" else _activate(z, activation)
        if keep:
            kept.append(h if activation == "relu" else z)
    return kept, h


def _linear_into(h: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = h W^T + b, written in place where the types allow it."""
    if out.dtype != h.dtype:
        out.copy_(F.linear(h, weight, bias))
    elif bias is None:
        torch.mm(h, weight.t(), out=out)
    else:
        torch.addmm(bias, h, weight.t(), out=out)


def _activate(kept: Tensor, activation: str) -> Tensor:
    """a(z)."""
    if activation == "relu":
        return kept
    return F.silu(kept) if activation == "silu" else F.softplus(kept)


def _times_slope(value: Tensor, kept: Tensor, activation: str) -> Tensor:
    """value * a'(z); `value` may be one row, which stands for all."""
    if activation == "relu":
        if value.shape[0] != kept.shape[0]:
            value = value.expand_as(kept)
        return torch.ops.aten.threshold_backward(value, kept, 0)
    s = torch.sigmoid(kept)
    if activation == "silu":
        s = s * (1 + kept * (1 - s))
    return s * value


def _curvature(z: Tensor, activation: str) -> Tensor:
    """a''(z) of a smooth activation."""
    s = torch.sigmoid(z)
    curvature = s * (1 - s)
    return curvature * (2 + z * (1 - 2 * s)) if activation == "silu" else curvature
