"""A fused MLP, as it stands behind a hash grid in a NeRF field, and the gradient of its first output by its input.

    y = W_L a(... a(W_1 x + b_1) ...) + b_L,    v = d y_0 / d x = W_1^T D_1 W_2^T D_2 ... w

with D_i = diag(a'(z_i)) of the i-th layer's argument z_i and w the last layer's row 0. Where y_0 is a density logit, v
is what a normal is made of. Going back from the gradients of y and v, called g and u, activations are recomputed:
nothing is held between the passes but the arguments.

v's own gradient: let p_i = D_i q_i and q_i-1 = W_i^T p_i be what v passes on its way down from q = w to v = q_0. Then u
goes up as dq_0 = u, dp_i = W_i dq_i-1, dq_i = D_i dp_i, adding p_i dq_i-1^T to the gradient of W_i, the last dq to that
of w, and a''(z_i) q_i dp_i, nothing for a ReLU, to that of z_i, from where it goes down with g.

On GPUs that Triton serves this is two kernels, `dreamfusion_fast.ops._mlp_triton`, elsewhere torch products,
`dreamfusion_fast.ops._mlp_torch`, with the same formulas. `precision` is the type of the products' operands; sums are
float32. In both 16-bit precisions the gradients, and what is multiplied with them, are bfloat16: a distillation
gradient is 1e-6 and less per sample, which float16, whose normal numbers end at 6e-5, would round to few digits or to
zero, and there is no loss scale that holds for all samples.
"""

from collections.abc import Callable
from typing import Any, Sequence  # noqa: UP035 - the one that custom_op of torch 2.4 reads

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamfusion_fast.ops import _mlp_launch, _mlp_torch
from dreamfusion_fast.ops._checks import check_tensor, check_transforms
from dreamfusion_fast.ops._triton import triton_reason, triton_serves

__all__ = [
    "MlpGradients",
    "mlp",
    "mlp_backward_into",
    "mlp_forward_into",
    "mlp_reference",
    "mlp_with_input_gradient",
    "mlp_with_input_gradient_reference",
    "triton_reason",
    "triton_serves",
]

ACTIVATIONS = ("relu", "softplus", "silu")
PRECISIONS = tuple(_mlp_torch.OPERANDS)


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    activation: str = "relu",
    precision: str = "float32",
) -> Tensor:
    """The network's outputs.

    Args:
        x: ``[n, d_in]``, any strides; fast where samples (feature-major) or features are contiguous. Of the type that
            `precision` names, or float32; or float64 with float64 parameters, for which everything is float64.
        weights: of each layer ``[out, in]``, at least two, float32. The kernels know one hidden width of 16, 32, 64 or
            128 (in float32 up to 64) in 1 to 4 hidden layers, up to 128 inputs and 16 outputs; other networks run as
            torch products.
        biases: of each layer ``[out]``, or None for a network without.
        activation: ``"relu"``, ``"softplus"`` (beta 1) or ``"silu"``.
        precision: type of the products' operands: ``"float32"``, ``"float16"`` or ``"bfloat16"``.

    Returns:
        y ``[n, d_out]``, float32 (or float64). Differentiable once, to x, weights and biases.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or name.
        RuntimeError: torch.func or torch.vmap transforms an argument.
    """
    _check("mlp", x, weights, biases, activation, precision)
    check_transforms("mlp", x, *weights, *(biases or ()), vmap=False)
    return _forward(x, list(weights), list(biases or ()), activation, precision)


def mlp_with_input_gradient(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    activation: str = "relu",
    precision: str = "float32",
) -> tuple[Tensor, Tensor]:
    """The network's outputs, and the gradient of the first of them to x.

    Args:
        x, weights, biases, activation, precision: as in `mlp`.

    Returns:
        y ``[n, d_out]``, as `mlp`; v ``[n, d_in]``, of the type of x. Differentiable once, to x, weights and biases: v
        is a first derivative already, and its gradient a second.

    Raises:
        TypeError, ValueError, RuntimeError: as `mlp`.
    """
    _check("mlp_with_input_gradient", x, weights, biases, activation, precision)
    check_transforms("mlp_with_input_gradient", x, *weights, *(biases or ()), vmap=False)
    return _forward_with_input_gradient(x, list(weights), list(biases or ()), activation, precision)


class MlpGradients:
    """Sums of the gradients of a network's parameters over several calls of `mlp_backward_into`.

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
        parts = _split(flat, self._shapes)
        return parts[: self._n_weights], parts[self._n_weights :] if self._has_biases else None

    def result(self) -> tuple[list[Tensor], list[Tensor] | None]:
        """The gradients so far of weights and biases, None for biases that there are not."""
        return self.views(self.partials.sum(0) if self.partials.shape[0] > 1 else self.partials[0])


def mlp_forward_into(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    activation: str,
    precision: str,
    y: Tensor,
    input_gradient: Tensor | None = None,
    count: Tensor | None = None,
) -> None:
    """Writes y and v, for buffers that are used again and again. No autograd, nothing that waits for the GPU.

    Args:
        x, weights, biases, activation, precision: as in `mlp`.
        y: ``[n, d_out]``, float32 (float64 with float64 parameters), any strides; written.
        input_gradient: v, ``[n, d_in]``, of the type of x, any strides; written unless None.
        count: int32, one element, on the device: only the first ``min(n, count)`` rows are read and written (on a GPU
            that Triton does not serve, all are). None: all.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or name.
    """
    op = "mlp_forward_into"
    _check(op, x, weights, biases, activation, precision)
    _check_rows(op, "y", y, x, weights[-1].shape[0], [weights[0].dtype])
    if input_gradient is not None:
        _check_rows(op, "input_gradient", input_gradient, x, x.shape[1], [x.dtype])
    _check_count(op, count, x)
    _forward_into(x, weights, biases, activation, precision, y, input_gradient, count)


def mlp_backward_into(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    activation: str,
    precision: str,
    grad_y: Tensor,
    grad_x: Tensor | None,
    gradients: MlpGradients | None,
    grad_input_gradient: Tensor | None = None,
    count: Tensor | None = None,
) -> None:
    """Goes back from the gradients of y and v: writes that of x and adds those of the parameters to `gradients`.

    Args:
        x, weights, biases, activation, precision: as in `mlp`.
        grad_y: ``[n, d_out]``, float32 (float64 with float64 parameters), any strides.
        grad_x: ``[n, d_in]``, bfloat16 or float32 (or float64), any strides; written unless None.
        gradients: of these weights and biases; None where they are not wanted.
        grad_input_gradient: u, the gradient of v, ``[n, d_in]``, bfloat16 or float32 (or float64), any strides; None
            is zero.
        count: as in `mlp_forward_into`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or name.
    """
    op = "mlp_backward_into"
    _check(op, x, weights, biases, activation, precision)
    _check_rows(op, "grad_y", grad_y, x, weights[-1].shape[0], [weights[0].dtype])
    kinds = [weights[0].dtype] if weights[0].dtype == torch.float64 else [torch.bfloat16, torch.float32]
    if grad_x is not None:
        _check_rows(op, "grad_x", grad_x, x, x.shape[1], kinds)
    if grad_input_gradient is not None:
        _check_rows(op, "grad_input_gradient", grad_input_gradient, x, x.shape[1], kinds)
    _check_count(op, count, x)
    _backward_into(x, weights, biases, activation, precision, grad_y, grad_x, gradients, grad_input_gradient, count)


def prepared_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    activation: str,
    precision: str,
    y: Tensor,
    input_gradient: Tensor | None = None,
) -> Callable[[Tensor], None]:
    """`mlp_forward_into` for one tile after another: a function of the count alone, which checks nothing any more.

    A renderer's buffers are the same for all its tiles. To look at them anew for each takes longer than the launch.
    With an input gradient that is quick only where x is of the type that `precision` names.
    """
    stores_v = input_gradient is None or x.dtype == getattr(torch, precision)
    if stores_v and _mlp_launch.kernels_serve(x.device, weights, precision):
        return _mlp_launch.prepare_forward(x, weights, biases, activation, precision, y, input_gradient)

    def plain(count: Tensor) -> None:
        _forward_into(x, weights, biases, activation, precision, y, input_gradient, count)

    return plain


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
) -> Callable[[Tensor], None]:
    """`mlp_backward_into` for one tile after another; see `prepared_forward`."""
    if _mlp_launch.kernels_serve(x.device, weights, precision):
        partials = None if gradients is None else gradients.partials
        options = (biases, activation, precision, grad_y, grad_input_gradient, grad_x, partials)
        return _mlp_launch.prepare_backward(x, weights, *options)

    def plain(count: Tensor) -> None:
        options = (biases, activation, precision, grad_y, grad_x, gradients, grad_input_gradient, count)
        _backward_into(x, weights, *options)

    return plain


def mlp_reference(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, activation: str = "relu"
) -> Tensor:
    """`mlp` in plain PyTorch, for any float dtype that x and parameters share, differentiable any number of times."""
    function = {"relu": torch.relu, "softplus": F.softplus, "silu": F.silu}[activation]
    for layer, weight in enumerate(weights):
        x = F.linear(x if layer == 0 else function(x), weight, None if biases is None else biases[layer])
    return x


def mlp_with_input_gradient_reference(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, activation: str = "relu"
) -> tuple[Tensor, Tensor]:
    """`mlp_with_input_gradient` in plain PyTorch: v by autograd, differentiable any number of times."""
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        y = mlp_reference(x, weights, biases, activation)
        (v,) = torch.autograd.grad(y[:, 0].sum(), x, create_graph=True)
    return y, v


@torch.no_grad()
def _forward_into(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    activation: str,
    precision: str,
    y: Tensor,
    input_gradient: Tensor | None,
    count: Tensor | None,
) -> None:
    """`mlp_forward_into` of arguments that are right."""
    if _mlp_launch.kernels_serve(x.device, weights, precision):
        _mlp_launch.forward(x, weights, biases, activation, precision, y, input_gradient, count)
        return
    if count is not None and x.device.type == "cpu":
        n = _rows(x, count)
        x, y = x[:n], y[:n]
        input_gradient = None if input_gradient is None else input_gradient[:n]
    _mlp_torch.forward(x, weights, biases, activation, _operand(weights, precision), y, input_gradient)


@torch.no_grad()
def _backward_into(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    activation: str,
    precision: str,
    grad_y: Tensor,
    grad_x: Tensor | None,
    gradients: MlpGradients | None,
    grad_input_gradient: Tensor | None,
    count: Tensor | None,
) -> None:
    """`mlp_backward_into` of arguments that are right."""
    partials = None if gradients is None else gradients.partials
    if _mlp_launch.kernels_serve(x.device, weights, precision):
        u = grad_input_gradient
        counted = count is not None
        options = (biases, activation, precision, grad_y, u, grad_x, partials, counted)
        _mlp_launch.prepare_backward(x, weights, *options)(count)
        return
    if count is not None:
        x, grad_y, grad_x, grad_input_gradient = _first_rows(count, x, grad_y, grad_x, grad_input_gradient)
    sums = (None, None) if gradients is None else gradients.views(gradients.partials[0])
    operand = _operand(weights, precision)
    _mlp_torch.backward(x, weights, biases, activation, operand, grad_y, grad_input_gradient, grad_x, *sums)


def _check(
    op: str, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, activation: str, precision: str
) -> None:
    where = f"dreamfusion_fast.ops.{op}"
    if activation not in ACTIVATIONS:
        raise ValueError(f"{where}: activation must be {', '.join(ACTIVATIONS)}, got {activation!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"{where}: precision must be {', '.join(PRECISIONS)}, got {precision!r}")
    if len(weights) < 2:
        raise ValueError(f"{where}: weights must be those of at least two layers, got {len(weights)}")
    if biases is not None and len(biases) != len(weights):
        raise ValueError(f"{where}: biases must be as many as weights, {len(weights)}, or None, got {len(biases)}")
    check_tensor(op, "weights[0]", weights[0], ["out", "in"])
    for layer, weight in enumerate(weights):
        inputs = "in" if layer == 0 else weights[layer - 1].shape[0]
        check_tensor(op, f"weights[{layer}]", weight, ["out", inputs], like=weights[0], same_dtype=True)
        if biases is not None:
            bias = biases[layer]
            check_tensor(op, f"biases[{layer}]", bias, [weight.shape[0]], like=weights[0], same_dtype=True)
        if 0 in weight.shape:
            raise ValueError(f"{where}: weights[{layer}] must have rows and columns, got {list(weight.shape)}")
    double = weights[0].dtype == torch.float64
    if double and precision != "float32":
        raise ValueError(f"{where}: precision must be float32 where parameters are float64, got {precision!r}")
    kinds = [torch.float64] if double else list(dict.fromkeys((torch.float32, _mlp_torch.OPERANDS[precision])))
    check_tensor(op, "x", x, ["n", weights[0].shape[1]], kinds, like=weights[0])
    if x.shape[0] > _mlp_launch.MAX_ROWS:
        raise ValueError(f"{where}: x must have at most 2^30 rows, got {x.shape[0]}")


def _check_rows(op: str, name: str, tensor: Tensor, x: Tensor, columns: int, kinds: Sequence[torch.dtype]) -> None:
    check_tensor(op, name, tensor, [x.shape[0], columns], kinds, like=x)


def _check_count(op: str, count: Tensor | None, x: Tensor) -> None:
    if count is None:
        return
    if not isinstance(count, Tensor) or count.numel() != 1 or count.dtype != torch.int32 or count.device != x.device:
        given = f"{count.dtype} {list(count.shape)} on {count.device}" if isinstance(count, Tensor) else repr(count)
        raise ValueError(
            f"dreamfusion_fast.ops.{op}: count must be a torch.int32 tensor with one element on {x.device}, got {given}"
        )


def _split(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """A vector seen as tensors of these shapes, one after the other."""
    parts = flat.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _operand(weights: Sequence[Tensor], precision: str) -> torch.dtype:
    return torch.float64 if weights[0].dtype == torch.float64 else _mlp_torch.OPERANDS[precision]


def _rows(x: Tensor, count: Tensor) -> int:
    return max(0, min(x.shape[0], int(count)))


def _first_rows(
    count: Tensor, x: Tensor, grad_y: Tensor, grad_x: Tensor | None, u: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The rows that count: on a GPU, which is not to be waited for, all, with zeros in what may hold anything."""
    if x.device.type == "cpu":
        n = _rows(x, count)
        return x[:n], grad_y[:n], None if grad_x is None else grad_x[:n], None if u is None else u[:n]
    counts = (torch.arange(x.shape[0], device=x.device) < count.view(())).unsqueeze(1)
    kept = [None if tensor is None else torch.where(counts, tensor, 0) for tensor in (x, grad_y, u)]
    assert kept[0] is not None
    assert kept[1] is not None
    return kept[0], kept[1], grad_x, kept[2]


@torch.library.custom_op("dreamfusion_fast::mlp", mutates_args=())
def _forward(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str, precision: str) -> Tensor:
    y = weights[0].new_empty(x.shape[0], weights[-1].shape[0])
    mlp_forward_into(x, weights, biases or None, activation, precision, y)
    return y


@_forward.register_fake
def _(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str, precision: str) -> Tensor:
    return weights[0].new_empty(x.shape[0], weights[-1].shape[0])


@torch.library.custom_op("dreamfusion_fast::mlp_with_input_gradient", mutates_args=())
def _forward_with_input_gradient(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str, precision: str
) -> tuple[Tensor, Tensor]:
    y = weights[0].new_empty(x.shape[0], weights[-1].shape[0])
    v = torch.empty_like(x)
    mlp_forward_into(x, weights, biases or None, activation, precision, y, v)
    return y, v


@_forward_with_input_gradient.register_fake
def _(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str, precision: str
) -> tuple[Tensor, Tensor]:
    return weights[0].new_empty(x.shape[0], weights[-1].shape[0]), torch.empty_like(x)


@torch.library.custom_op("dreamfusion_fast::mlp_backward", mutates_args=())
def _backward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    precision: str,
    grad_y: Tensor,
    u: Tensor | None,
    to_x: bool,
    to_parameters: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and, in one vector, of the parameters; empty where not wanted."""
    grad_x = torch.empty_like(x, dtype=weights[0].dtype) if to_x else x.new_empty(0)
    gradients = MlpGradients(weights, biases or None) if to_parameters else None
    mlp_backward_into(x, weights, biases or None, activation, precision, grad_y, grad_x if to_x else None, gradients, u)
    return grad_x.to(x.dtype), weights[0].new_empty(0) if gradients is None else gradients.partials.sum(0)


@_backward.register_fake
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    precision: str,
    grad_y: Tensor,
    u: Tensor | None,
    to_x: bool,
    to_parameters: bool,
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x) if to_x else x.new_empty(0)
    size = sum(parameter.numel() for parameter in (*weights, *biases)) if to_parameters else 0
    return grad_x, weights[0].new_empty(size)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weights, biases, ctx.activation, ctx.precision = inputs
    ctx.n_weights = len(weights)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *weights, *biases)


def _go_back(ctx: Any, grad_y: Tensor | None, u: Tensor | None = None) -> tuple[Any, ...]:
    x, *parameters = ctx.saved_tensors
    weights, biases = parameters[: ctx.n_weights], parameters[ctx.n_weights :]
    if grad_y is None:
        grad_y = weights[0].new_zeros(x.shape[0], weights[-1].shape[0])
    if u is not None and u.dtype == torch.float16:
        u = u.float()
    to_x = ctx.needs_input_grad[0]
    to_parameters = any(ctx.needs_input_grad[1]) or any(ctx.needs_input_grad[2])
    grad_x, flat = _backward(x, weights, biases, ctx.activation, ctx.precision, grad_y, u, to_x, to_parameters)
    to_weights: list[Tensor | None] = [None] * len(weights)
    to_biases: list[Tensor | None] = [None] * len(biases)
    if to_parameters:
        shaped = _split(flat, [parameter.shape for parameter in parameters])
        to_weights[:], to_biases[:] = shaped[: len(weights)], shaped[len(weights) :]
    return grad_x if to_x else None, to_weights, to_biases, None, None


_forward.register_autograd(_go_back, setup_context=_save)
_forward_with_input_gradient.register_autograd(_go_back, setup_context=_save)
