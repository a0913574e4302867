"""tiny-cuda-nn's MLPs: without biases, with widths that are multiples of 16."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from dreamfusion_fast.integrations.tinycudann.config import Options
from dreamfusion_fast.ops import mlp, mlp_reference
from dreamfusion_fast.ops._checks import shown
from dreamfusion_fast.ops.mlp import _backward

ALIGNMENT = 16
_SHARPNESS = 10.0  # of Squareplus and Softplus, whose threshold of 40 is beyond what float64 tells from x
_KINDS = {"fullyfusedmlp": True, "megakernelmlp": True, "mlp": False, "cutlassmlp": False}
_FUSED_WIDTHS = (16, 32, 64, 128, 256)


def _squareplus(x: Tensor) -> Tensor:
    x = x * _SHARPNESS
    return (x + (x * x + 4).sqrt()) / (2 * _SHARPNESS)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "None": lambda x: x,
    "ReLU": torch.relu,
    "LeakyReLU": F.leaky_relu,
    "Exponential": torch.exp,
    "Sigmoid": torch.sigmoid,
    "Sine": torch.sin,
    "Squareplus": _squareplus,
    "Softplus": lambda x: F.softplus(x, beta=_SHARPNESS, threshold=40),
    "Tanh": torch.tanh,
    "SiLU": F.silu,
}
_FUSED_ACTIVATIONS = {"ReLU": "relu", "SiLU": "silu"}


def padded(n: int) -> int:
    """The next multiple of 16."""
    return -(-n // ALIGNMENT) * ALIGNMENT


class Mlp:
    """A network of `n_hidden_layers` layers of `n_neurons`, and one more.

    Args:
        n_input: dimensions of its inputs, a multiple of 16.
        n_output: dimensions of its results.
        config: "otype" (FullyFusedMLP or CutlassMLP, which are the same here), "n_neurons", "n_hidden_layers",
            "activation", "output_activation".

    Raises:
        TypeError, ValueError: an unknown otype, or an option of the wrong kind or out of its range. Keys that are not
            options warn once.
    """

    def __init__(self, n_input: int, n_output: int, config: Any) -> None:
        options = Options("Network", config, "MLP")
        if options.otype.lower() not in _KINDS:
            raise ValueError(f"Network: otype must be FullyFusedMLP, CutlassMLP or MLP, got {shown(options.otype)}")
        fused = _KINDS[options.otype.lower()]
        least, wanted = (1, "at least 1") if fused else (0, "at least 0")
        layers = options.number("n_hidden_layers", 5, wanted, lambda n: n >= least)
        wanted = "16, 32, 64, 128 or 256" if fused else "a multiple of 16"
        width = options.number(
            "n_neurons", 128, wanted, lambda n: n in _FUSED_WIDTHS if fused else n > 0 and n % ALIGNMENT == 0
        )
        names = {name: name for name in ACTIVATIONS}
        self.activation = options.choice("activation", "ReLU", names)
        self.output_activation = options.choice("output_activation", "None", names)
        if options.flag("feedback_alignment", False):
            raise ValueError(f"{options.where}: feedback_alignment must be False, got True")
        options.end()
        self.n_output = n_output
        widths = [n_input, *[width] * layers, padded(n_output)]
        self.shapes = list(zip(widths[1:], widths[:-1], strict=True))  # of the matrices, row by row in the parameters
        self.n_params = sum(out * into for out, into in self.shapes)

    def initial(self, generator: Generator) -> Tensor:
        """``[n_params]`` float32: uniform in +-sqrt(6 / (fan in + fan out)), and for sines as Sitzmann et al. 2020."""
        parts = []
        for layer, (out, into) in enumerate(self.shapes):
            bound = math.sqrt(6 / (into + out))
            if self.activation == "Sine":
                bound = 30 / into if layer == 0 else math.sqrt(6 / into)
            parts.append((torch.rand(out * into, generator=generator) * 2 - 1) * bound)
        return torch.cat(parts)

    def __call__(self, x: Tensor, params: Tensor, half: bool) -> Tensor:
        """The results.

        Args:
            x: ``[n, n_input]``, float32 or float64.
            params: ``[n_params]``, of the same type.
            half: whether products may be of float16 operands, on a GPU.

        Returns:
            ``[n, n_output]``, differentiable any number of times.
        """
        weights = self.weights(params)
        if half and self.fused_activation is not None:
            y = fused_mlp(x, weights, self.fused_activation, "float16")
        else:
            function = ACTIVATIONS[self.activation]
            for layer, weight in enumerate(weights):
                x = F.linear(x if layer == 0 else function(x), weight)
            y = x
        return self.finish(y)

    @property
    def fused_activation(self) -> str | None:
        """The activation by the name of the fused kernels; None: they do not serve."""
        return _FUSED_ACTIVATIONS.get(self.activation) if len(self.shapes) > 1 else None

    def weights(self, params: Tensor) -> list[Tensor]:
        """The matrices in the parameters ``[n_params]``, the last one without the rows that nobody sees."""
        flat = params.split([out * into for out, into in self.shapes])
        weights = [part.view(shape) for part, shape in zip(flat, self.shapes, strict=True)]
        weights[-1] = weights[-1][: self.n_output]
        return weights

    def finish(self, y: Tensor) -> Tensor:
        """The last activation."""
        return ACTIVATIONS[self.output_activation](y)


def fused_mlp(x: Tensor, weights: Sequence[Tensor], activation: str, precision: str) -> Tensor:
    """`mlp` without biases, differentiable any number of times: the second derivative by PyTorch's operations.

    Args:
        x, weights, activation, precision: as `mlp`; x is rounded to the precision.

    Returns:
        ``[n, d_out]``, as `mlp`.
    """
    return _FusedMlp.apply(x, activation, precision, *weights)


class _FusedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str, precision: str, *weights: Tensor) -> Tensor:
        ctx.activation, ctx.precision = activation, precision
        ctx.save_for_backward(x, *weights)
        return mlp(_rounded(x, precision), list(weights), None, activation, precision)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        to_x, to_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[3:])
        if torch.is_grad_enabled():  # the gradient is to have one
            wanted = [x] * to_x + [weight for weight in weights if weight.requires_grad]
            y = mlp_reference(x, weights, None, ctx.activation)
            found = iter(torch.autograd.grad(y, wanted, grad_y, create_graph=True))
            grad_x = next(found) if to_x else None
            return grad_x, None, None, *(next(found) if weight.requires_grad else None for weight in weights)
        # Of x as it is, not rounded: its gradient is of its type, and small ones would be lost in 16 bits.
        grad_x, flat = _backward(x, list(weights), [], ctx.activation, ctx.precision, grad_y, None, to_x, to_weights)
        parts: Sequence[Tensor | None] = [None] * len(weights)
        if to_weights:
            sizes = [weight.numel() for weight in weights]
            parts = [part.view_as(weight) for part, weight in zip(flat.split(sizes), weights, strict=True)]
        return grad_x.to(x.dtype) if to_x else None, None, None, *parts


def _rounded(x: Tensor, precision: str) -> Tensor:
    return x if x.dtype == torch.float64 or precision == "float32" else x.to(getattr(torch, precision))
