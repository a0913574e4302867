"""The functions of ``_gridencoder``, the compiled module that gridencoder's Python imports first.

They write to tensors of the caller, and are called by position. Their arguments have changed over time; the forms that
are told apart are those of stable-dreamfusion and nerf2mesh, ``(..., L, max_level, S, H, dy_dx, gridtype,
align_corners, interpolation)``, of torch-ngp without max_level, and of its older versions with calc_grad_inputs before
dy_dx and without interpolation, or align_corners, too. B, D, C and L are batch, dimensions, features and levels, S and
H the binary logarithm of the growth per level and the first resolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreamfusion_fast.integrations.gridencoder.geometry import Geometry, encode
from dreamfusion_fast.integrations.gridencoder.regularise import add_total_variation, add_weight_decay
from dreamfusion_fast.ops._checks import check_tensor

flavour = "stable-dreamfusion"  # where a caller does not say it; see `install`
_FLOATS = (torch.float16, torch.float32, torch.float64)


@dataclass
class _Call:
    geometry: Geometry
    levels: int
    smoothstep: bool
    dy_dx: Tensor | None
    grad_inputs: Tensor | None = None


def _read(op: str, sizes: tuple[Any, ...], backward: bool) -> _Call:
    """The arguments from B on, in whichever form they come."""
    _, dims, _, n_levels, *rest = sizes
    grads = 2 if backward else 1  # dy_dx, and grad_inputs
    of, max_level = flavour, n_levels
    if len(rest) == 6 + grads:
        max_level, *rest = rest
    else:
        of = "torch-ngp"
    if len(rest) not in (4 + grads, 5 + grads):
        raise TypeError(f"{op}: takes {'14 to 17' if backward else '13 to 15'} arguments, got another number")
    scale, base, *rest = rest
    wanted = True
    if isinstance(rest[0], bool):  # calc_grad_inputs
        wanted, *rest = rest
    arrays, (gridtype, *options) = rest[:grads], rest[grads:]
    align_corners = bool(options[0]) if options else False
    smoothstep = len(options) > 1 and int(options[1]) == 1
    placed = Geometry(float(scale), int(base), int(n_levels), int(dims), int(gridtype) == 0, align_corners, of)
    return _Call(placed, int(max_level), smoothstep, *(array if wanted else None for array in arrays))


def _computed(inputs: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the type that is computed in."""
    dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    return inputs.detach().to(dtype), embeddings.detach().to(dtype)


def grid_encode_forward(inputs: Tensor, embeddings: Tensor, offsets: Tensor, outputs: Tensor, *sizes: Any) -> None:
    """Writes the encoding, and its Jacobian where wanted.

    Args:
        inputs: ``[B, D]``, in [0, 1]; zeros are written elsewhere.
        embeddings: ``[rows, C]``.
        offsets: ``[L + 1]`` int32.
        outputs: ``[L, B, C]``, out, its first max_level levels.
        sizes: B, D, C, L, max_level, S, H, dy_dx (``[B, L * D * C]``, out, or None), gridtype, align_corners,
            interpolation.

    Raises:
        TypeError, ValueError: a tensor of the wrong type, shape or device, or another number of arguments.
    """
    op = "grid_encode_forward"
    call = _read(op, sizes, backward=False)
    n, dims, features, n_levels = (int(size) for size in sizes[:4])
    check_tensor(op, "inputs", inputs, [n, dims], _FLOATS)
    check_tensor(op, "embeddings", embeddings, ["rows", features], _FLOATS, inputs)
    check_tensor(op, "outputs", outputs, [n_levels, n, features], _FLOATS, inputs)
    positions, table = _computed(inputs, embeddings)
    with torch.no_grad():
        found = encode(positions, table, offsets, call.geometry, call.smoothstep, n_levels)
        outputs[: call.levels] = found[:, : call.levels].transpose(0, 1).to(outputs.dtype)
    if call.dy_dx is not None:
        check_tensor(op, "dy_dx", call.dy_dx, [n, n_levels * dims * features], _FLOATS, inputs)
        jacobian = call.dy_dx.view(n, n_levels, dims, features)
        with torch.enable_grad():
            points = positions.requires_grad_()
            found = encode(points, table, offsets, call.geometry, call.smoothstep, n_levels)
            any_values = torch.zeros_like(found).requires_grad_()
            (gradient,) = torch.autograd.grad(found, points, any_values, create_graph=True)
        for axis in range(dims):  # the gradient is linear in the values, and its own gradient by them a column
            column = torch.zeros_like(positions)
            column[:, axis] = 1
            (along,) = torch.autograd.grad(gradient, any_values, column, retain_graph=True)
            jacobian[:, : call.levels, axis] = along[:, : call.levels].to(jacobian.dtype)


def grid_encode_backward(
    grad: Tensor, inputs: Tensor, embeddings: Tensor, offsets: Tensor, grad_embeddings: Tensor, *sizes: Any
) -> None:
    """Adds the gradient by the table, and writes that by the inputs where wanted.

    Args:
        grad: ``[L, B, C]``.
        inputs, embeddings, offsets: as in `grid_encode_forward`.
        grad_embeddings: ``[rows, C]``, added to.
        sizes: B, D, C, L, max_level, S, H, dy_dx (as written before), grad_inputs (``[B, D]``, out; both or neither
            None), gridtype, align_corners, interpolation.

    Raises:
        TypeError, ValueError: as `grid_encode_forward`.
    """
    op = "grid_encode_backward"
    call = _read(op, sizes, backward=True)
    n, dims, features, n_levels = (int(size) for size in sizes[:4])
    check_tensor(op, "grad", grad, [n_levels, n, features], _FLOATS, inputs)
    check_tensor(op, "grad_embeddings", grad_embeddings, embeddings.shape, _FLOATS, inputs)
    positions, table = _computed(inputs, embeddings)
    levels, grads = call.levels, grad.transpose(0, 1).to(table.dtype)
    if levels < n_levels:
        grads = torch.cat([grads[:, :levels], torch.zeros_like(grads[:, levels:])], 1)
    with torch.enable_grad():
        table = table.requires_grad_()
        found = encode(positions, table, offsets, call.geometry, call.smoothstep, n_levels)
        (by_table,) = torch.autograd.grad(found, table, grads)
    grad_embeddings += by_table.to(grad_embeddings.dtype)
    if call.dy_dx is not None and call.grad_inputs is not None:
        jacobian = call.dy_dx.view(n, n_levels, dims, features)[:, :levels].to(table.dtype)
        by_inputs = torch.einsum("blc,bldc->bd", grads[:, :levels], jacobian)
        call.grad_inputs.copy_(by_inputs.to(call.grad_inputs.dtype))


def grad_total_variation(
    inputs: Tensor,
    embeddings: Tensor,
    grad: Tensor,
    offsets: Tensor,
    weight: float,
    *sizes: Any,
) -> None:
    """Adds the gradient of a total variation at inputs ``[B, D]`` to grad ``[rows, C]``; see `add_total_variation`.

    The sizes are B, D, C, L, S, H, gridtype, align_corners.
    """
    _, dims, _, n_levels, scale, base, gridtype, align_corners = sizes
    options = (int(gridtype) == 0, bool(align_corners), flavour)
    placed = Geometry(float(scale), int(base), int(n_levels), int(dims), *options)
    add_total_variation(grad, inputs.detach(), embeddings.detach(), offsets.tolist(), placed, weight)


def grad_weight_decay(embeddings: Tensor, grad: Tensor, offsets: Tensor, weight: float, *sizes: int) -> None:
    """Adds the gradient of a weight decay, averaged per level, to grad ``[rows, C]``; see `add_weight_decay`.

    The sizes are rows, C and L, and not needed.
    """
    add_weight_decay(grad, embeddings.detach(), offsets, weight)
