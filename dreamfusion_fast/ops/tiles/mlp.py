"""The fused MLP over buffers of the caller, as a renderer uses it that streams samples in tiles.

The formulas are those of `dreamfusion_fast.ops.mlp`. There is no autograd here and nothing waits for a GPU. A pass is
prepared once for its buffers and then called for one tile after another, with a count of samples that lies on the
device: a renderer's buffers are the same for all its tiles, and to look at them anew for each takes longer than the
launch. So nothing is checked here, either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dreamfusion_fast.ops import _mlp_launch, _mlp_torch
from dreamfusion_fast.ops._mlp_torch import Network

Pass = Callable[[Tensor | None], None]
"""Takes the count, int32 with one element, on the device: only the first ``min(n, count)`` rows are read and written
(on a GPU that Triton does not serve, all are). None: all rows."""


class MlpGradients:
    """Sums of the gradients of a network's parameters over several passes of `prepared_backward`.

    Each program of the kernel adds to a slice of its own, so that the sum has one order, call by call the same, and no
    atomics.
    """

    partials: Tensor
    """``[programs, parameters]``, of the weights' type: all weights, then all biases."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor] | None) -> None:
        """Zeros for the parameters of these shapes, on their device."""
        self._shapes = [parameter.shape for parameter in (*weights, *(biases or ()))]
        self._n_weights, self._has_biases = len(weights), biases is not None
        device, programs = weights[0].device, 1
        if _mlp_launch.kernels_serve(device, weights):
            programs = _mlp_launch.backward_programs(device, weights)
        total = sum(shape.numel() for shape in self._shapes)
        self.partials = torch.zeros(programs, total, dtype=weights[0].dtype, device=device)

    def views(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor] | None]:
        """A vector of all parameters, seen as weights and biases."""
        parts = split(flat, self._shapes)
        return parts[: self._n_weights], parts[self._n_weights :] if self._has_biases else None

    def result(self) -> tuple[list[Tensor], list[Tensor] | None]:
        """The gradients of weights and biases so far; None for the biases of a network without."""
        return self.views(self.partials.sum(0) if self.partials.shape[0] > 1 else self.partials[0])


def split(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """A vector seen as tensors of these shapes, one after the other."""
    parts = flat.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def prepared_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    activation: str,
    precision: str,
    y: Tensor,
    input_gradient: Tensor | None = None,
    counted: bool = True,
) -> Pass:
    """A function that writes the outputs and, where wanted, the gradient of the first of them to x.

    Args:
        x, weights, biases, activation, precision: as in `dreamfusion_fast.ops.mlp.mlp`. With an input gradient, x is of
            the type that `precision` names (float64 with float64 parameters).
        y: ``[n, d_out]``, of the weights' type, any strides; written.
        input_gradient: v, ``[n, d_in]``, of the type of x, any strides; written unless None.
        counted: whether the function will be called with a count.
    """
    network = Network(weights, biases, activation, precision)
    if _mlp_launch.kernels_serve(x.device, weights, precision):
        return _mlp_launch.prepare_forward(x, network, y, input_gradient, counted)

    @torch.no_grad()
    def run(count: Tensor | None) -> None:
        rows_of_x, *outputs = _first(count, x, y, input_gradient)
        _mlp_torch.forward(rows_of_x, network, *outputs)

    return run


def prepared_backward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    activation: str,
    precision: str,
    grad_y: Tensor,
    grad_x: Tensor | None,
    gradients: MlpGradients | None,
    grad_input_gradient: Tensor | None = None,
    counted: bool = True,
) -> Pass:
    """A function that goes back from the gradients of y and v: it writes that of x and adds to the parameters' sums.

    Args:
        x, weights, biases, activation, precision, counted: as in `prepared_forward`; x may be float32 in any precision.
        grad_y: ``[n, d_out]``, of the weights' type, any strides.
        grad_x: ``[n, d_in]``, bfloat16 or float32 (or float64), any strides; written unless None.
        gradients: of these weights and biases; None where they are not wanted.
        grad_input_gradient: u, the gradient of v, ``[n, d_in]``, bfloat16 or float32 (or float64), any strides; None
            is zero.
    """
    network, u = Network(weights, biases, activation, precision), grad_input_gradient
    if _mlp_launch.kernels_serve(x.device, weights, precision):
        partials = None if gradients is None else gradients.partials
        return _mlp_launch.prepare_backward(x, network, grad_y, u, grad_x, partials, counted)
    sums = (None, None) if gradients is None else gradients.views(gradients.partials[0])

    @torch.no_grad()
    def run(count: Tensor | None) -> None:
        *inputs, output = _first(count, x, grad_y, u, grad_x)
        if count is not None and count.is_cuda:  # which is not waited for: zeros in what may hold anything
            live = (torch.arange(x.shape[0], device=x.device) < count)[:, None]
            inputs = [None if tensor is None else torch.where(live, tensor, 0) for tensor in inputs]
        _mlp_torch.backward(inputs[0], network, inputs[1], inputs[2], output, *sums)

    return run


def _first(count: Tensor | None, *tensors: Tensor | None) -> list[Any]:
    """The rows that count of each tensor; on a GPU, which is not to be waited for, all."""
    rows = slice(None if count is None or count.is_cuda else max(int(count), 0))
    return [None if tensor is None else tensor[rows] for tensor in tensors]


def prepared_forward_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    activation: str,
    precision: str,
    y: Tensor,
    input_gradient: Tensor | None = None,
) -> Pass:
    """The PyTorch twin of `prepared_forward`: in the weights' type, whatever the precision."""

    def run(count: Tensor | None) -> None:
        rows = slice(None if count is None else max(int(count), 0))
        outputs = _both_reference(x[rows].to(weights[0].dtype), weights, biases, activation)
        for buffer, output in zip((y, input_gradient), outputs, strict=True):
            if buffer is not None:
                buffer[rows] = output.detach()

    return run


def prepared_backward_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    activation: str,
    precision: str,
    grad_y: Tensor,
    grad_x: Tensor | None,
    gradients: MlpGradients | None,
    grad_input_gradient: Tensor | None = None,
) -> Pass:
    """The PyTorch twin of `prepared_backward`: autograd, in the weights' type, whatever the precision."""

    def run(count: Tensor | None) -> None:
        rows, n = slice(None if count is None else max(int(count), 0)), len(weights)
        leaves = (x[rows].to(weights[0].dtype), *weights, *(biases or ()))
        first, *others = (leaf.detach().requires_grad_() for leaf in leaves)
        y, v = _both_reference(first, others[:n], others[n:] or None, activation)
        u = torch.zeros_like(v) if grad_input_gradient is None else grad_input_gradient[rows].to(v.dtype)
        options = {"allow_unused": True, "materialize_grads": True}
        to_x, *to_others = torch.autograd.grad((y, v), (first, *others), (grad_y[rows], u), **options)
        if grad_x is not None:
            grad_x[rows] = to_x
        if gradients is not None:
            gradients.partials[0] += torch.cat([gradient.flatten() for gradient in to_others])

    return run


def _both_reference(*arguments: Any) -> tuple[Tensor, Tensor]:
    from dreamfusion_fast.ops.mlp import mlp_with_input_gradient_reference  # which imports this module

    return mlp_with_input_gradient_reference(*arguments)
