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

from typing import Any, Sequence  # noqa: UP035 - the one that custom_op of torch 2.4 reads

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamfusion_fast.ops._checks import as_list, check_tensor, check_transforms, shown
from dreamfusion_fast.ops._mlp_launch import MAX_ROWS
from dreamfusion_fast.ops._mlp_torch import OPERANDS
from dreamfusion_fast.ops.tiles.mlp import MlpGradients, prepared_backward, prepared_forward, split

ACTIVATIONS = ("relu", "softplus", "silu")
PRECISIONS = tuple(OPERANDS)


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
    weights, biases = _check("mlp", x, weights, biases, activation, precision)
    check_transforms("mlp", x, *weights, *biases, vmap=False)
    return _forward(x, weights, biases, activation, precision)


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
    weights, biases = _check("mlp_with_input_gradient", x, weights, biases, activation, precision)
    check_transforms("mlp_with_input_gradient", x, *weights, *biases, vmap=False)
    return _forward_with_input_gradient(x, weights, biases, activation, precision)


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


def _check(
    op: str, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, activation: str, precision: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases as the op takes them."""
    for name, value, choices in (("activation", activation, ACTIVATIONS), ("precision", precision, PRECISIONS)):
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{op}: {name} must be {', '.join(choices)}, got {shown(value)}")
    weights = as_list(op, "weights", weights)
    biases = None if biases is None else as_list(op, "biases", biases)
    if len(weights) < 2:
        raise ValueError(f"{op}: weights must be those of at least two layers, got {len(weights)}")
    if biases is not None and len(biases) != len(weights):
        raise ValueError(f"{op}: biases must be as many as weights, {len(weights)}, or None, got {len(biases)}")
    check_tensor(op, "weights[0]", weights[0], ["out", "in"])
    for layer, weight in enumerate(weights):
        inputs = "in" if layer == 0 else weights[layer - 1].shape[0]
        check_tensor(op, f"weights[{layer}]", weight, ["out", inputs], like=weights[0], same_dtype=True)
        if biases is not None:
            bias = biases[layer]
            check_tensor(op, f"biases[{layer}]", bias, [weight.shape[0]], like=weights[0], same_dtype=True)
        if 0 in weight.shape:
            raise ValueError(f"{op}: weights[{layer}] must have rows and columns, got {list(weight.shape)}")
    double = weights[0].dtype == torch.float64
    if double and precision != "float32":
        raise ValueError(f"{op}: precision must be float32 where parameters are float64, got {precision!r}")
    kinds = [torch.float64] if double else list(dict.fromkeys((torch.float32, OPERANDS[precision])))
    check_tensor(op, "x", x, ["n", weights[0].shape[1]], kinds, like=weights[0])
    if x.shape[0] > MAX_ROWS:
        raise ValueError(f"{op}: x must have at most 2^30 rows, got {x.shape[0]}")
    return weights, biases or []


@torch.library.custom_op("dreamfusion_fast::mlp", mutates_args=())
def _forward(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str, precision: str) -> Tensor:
    y = weights[0].new_empty(x.shape[0], weights[-1].shape[0])
    prepared_forward(x, weights, biases or None, activation, precision, y, counted=False)(None)
    return y


@_forward.register_fake
def _(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str, precision: str) -> Tensor:
    return weights[0].new_empty(x.shape[0], weights[-1].shape[0])


@torch.library.custom_op("dreamfusion_fast::mlp_with_input_gradient", mutates_args=())
def _forward_with_input_gradient(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str, precision: str
) -> tuple[Tensor, Tensor]:
    y = weights[0].new_empty(x.shape[0], weights[-1].shape[0])
    # A kernel stores v in the type of its operands: Triton 3.6 fails to compile another.
    narrow = x if x.dtype == torch.float64 else x.to(OPERANDS[precision])
    v = torch.empty_like(narrow)
    prepared_forward(narrow, weights, biases or None, activation, precision, y, v, counted=False)(None)
    return y, v.to(x.dtype)


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
    grad_x = torch.empty_like(x, dtype=weights[0].dtype) if to_x else None
    gradients = MlpGradients(weights, biases or None) if to_parameters else None
    outputs = (grad_y, grad_x, gradients, u)
    prepared_backward(x, weights, biases or None, activation, precision, *outputs, counted=False)(None)
    return (
        x.new_empty(0) if grad_x is None else grad_x.to(x.dtype),
        weights[0].new_empty(0) if gradients is None else gradients.partials.sum(0),
    )


@_backward.register_fake
def _(x: Tensor, weights: list[Tensor], biases: list[Tensor], *others: Any) -> tuple[Tensor, Tensor]:
    *_, to_x, to_parameters = others
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
    shaped: list[Any] = [None] * len(parameters)
    if to_parameters:
        shaped = split(flat, [parameter.shape for parameter in parameters])
    return grad_x if to_x else None, shaped[: ctx.n_weights], shaped[ctx.n_weights :], None, None


_forward.register_autograd(_go_back, setup_context=_save)
_forward_with_input_gradient.register_autograd(_go_back, setup_context=_save)
