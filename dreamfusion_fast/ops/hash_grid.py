"""Multiresolution hash grid encoding (Müller et al. 2022, "Instant Neural Graphics Primitives", section 3).

Four ops, each the derivative of one before: the encoding; its backward to the table; its backward to the positions; the
backward of that one. Autograd formulas connect them, so that the encoding can be differentiated twice, as a loss on
normals needs. None of them stores anything per corner: each recomputes cells and weights from the positions.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Sequence  # noqa: UP035 - the one that custom_op of torch 2.4 reads

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamfusion_fast.ops._checks import check_flag, check_number, check_tensor, check_transforms
from dreamfusion_fast.ops._native import call, pointer
from dreamfusion_fast.ops.hash_grid_placement import check_placed, check_placements, placed_cells, vertex_rows

FEATURES = (1, 2, 4, 8)


def hash_grid(
    positions: Tensor,
    table: Tensor,
    level_offsets: Tensor,
    resolutions: Tensor,
    smoothstep: bool = False,
    placements: Tensor | None = None,
) -> Tensor:
    """Encodes positions by interpolating a table of features at several resolutions.

    A level with resolution N has (N + 1)^3 vertices at multiples of 1/N, and the features at a position are the
    trilinear interpolation between the 8 vertices around it. If the level's rows suffice, vertex (x, y, z) has row
    ``x + (N + 1) (y + (N + 1) z)``, else ``(x xor 2654435761 y xor 805459861 z) mod rows`` (products modulo 2^32).

    Args:
        positions: ``[n_samples, 3]``, float32 or float64; clamped to [0, 1], with no gradient outside. NaN gives NaN.
        table: ``[n_rows, n_features]``, same dtype, n_features one of 1, 2, 4, 8.
        level_offsets: ``[n_levels + 1]`` int64, first row of each level and, last, n_rows; see `hash_grid_layout`.
        resolutions: ``[n_levels]`` int32, cells per axis, at least 1, at most 2^24.
        smoothstep: interpolate with 3 u^2 - 2 u^3 in place of u, which has a continuous gradient.
        placements: ``[n_levels, 8]`` float32, where levels lie otherwise than above; see `hash_grid_placements`.
            Resolutions then only tell coarse levels from fine ones. Positions may be ``[n_samples, 2]``, too, with
            placements of that many dimensions, and are clamped as those say.

    Returns:
        ``[n_samples, n_levels * n_features]``: the features of level 0, then of level 1, ... Differentiable twice to
        positions and table. On the CPU the result and the gradients are the same bits for any number of threads.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device. A level that does not lie inside the
            table is found on the CPU only; on a GPU, where the check would wait, its features are NaN.
        RuntimeError: the native core for this device was not built, or torch.func differentiates an argument.
    """
    _check("hash_grid", positions, table, level_offsets, resolutions, smoothstep, placements)
    check_transforms("hash_grid", positions, table)
    return _forward(_in_space(positions), table, level_offsets, resolutions, smoothstep, placements)


def hash_grid_position_gradient(
    grad_output: Tensor,
    positions: Tensor,
    table: Tensor,
    level_offsets: Tensor,
    resolutions: Tensor,
    smoothstep: bool = False,
    placements: Tensor | None = None,
) -> Tensor:
    """The gradient of ``sum(grad_output * hash_grid(positions, ...))`` by the positions, itself differentiable.

    This is what `torch.autograd.grad(..., create_graph=True)` computes, without a graph of the encoding: normals take
    grad_output from a hand-derived backward of the network behind the encoding and call this.

    Args:
        grad_output: ``[n_samples, n_levels * n_features]``, same dtype as positions.
        positions, table, level_offsets, resolutions, smoothstep, placements: as in `hash_grid`.

    Returns:
        Of the shape of positions, differentiable once to grad_output, positions and table, in a pass that recomputes
        the interpolation: nothing but the arguments is held for it.

    Raises:
        TypeError, ValueError, RuntimeError: as `hash_grid`.
    """
    _check("hash_grid_position_gradient", positions, table, level_offsets, resolutions, smoothstep, placements)
    shape = [positions.shape[0], resolutions.shape[0] * table.shape[1]]
    check_tensor("hash_grid_position_gradient", "grad_output", grad_output, shape, like=positions, same_dtype=True)
    check_transforms("hash_grid_position_gradient", grad_output, positions, table)
    levels = (level_offsets, resolutions, smoothstep, placements)
    return _backward_positions(grad_output, _in_space(positions), table, *levels)[:, : positions.shape[1]]


def hash_grid_layout(
    levels: int, base_resolution: int, finest_resolution: int, log2_rows: int
) -> tuple[Tensor, Tensor]:
    """Where each level of a hash grid lives in its table, and how fine it is.

    Resolutions form a geometric progression from base_resolution to finest_resolution (Müller et al. 2022, eq. 2, 3).
    A level with resolution N gets ``min((N + 1)^3, 2^log2_rows)`` rows, rounded up to a multiple of 8.

    Args:
        levels: 1 to 1024.
        base_resolution, finest_resolution: cells per axis of the first and of the last level, 1 to 2^24.
        log2_rows: of the most rows that a level gets, 3 to 30.

    Returns:
        ``level_offsets [levels + 1]`` int64, the first row of each level and, last, the rows of the table;
        ``resolutions [levels]`` int32. Both on the CPU.

    Raises:
        TypeError, ValueError: no integer, or one out of its range.
    """
    op, most = "hash_grid_layout", 2**24
    check_number(op, "levels", levels, "at least 1 and at most 1024", lambda number: 1 <= number <= 1024, whole=True)
    wanted = "between base_resolution and 2^24"
    check_number(op, "finest_resolution", finest_resolution, wanted, lambda number: 1 <= number <= most, whole=True)
    wanted = f"at least 1 and at most finest_resolution, {finest_resolution}"
    check_number(
        op, "base_resolution", base_resolution, wanted, lambda number: 1 <= number <= finest_resolution, whole=True
    )
    check_number(op, "log2_rows", log2_rows, "between 3 and 30", lambda number: 3 <= number <= 30, whole=True)
    growth = (finest_resolution / base_resolution) ** (1.0 / max(levels - 1, 1))
    # The small addition keeps the last level from falling below finest_resolution by the rounding of the power.
    finenesses = [int(base_resolution * growth**level + 1e-6) for level in range(levels)]
    rows = [-(-min((n + 1) ** 3, 2**log2_rows) // 8) * 8 for n in finenesses]
    level_offsets = torch.zeros(levels + 1, dtype=torch.int64)
    level_offsets[1:] = torch.tensor(rows, dtype=torch.int64).cumsum(0)
    return level_offsets, torch.tensor(finenesses, dtype=torch.int32)


def _check(
    op: str,
    positions: Tensor,
    table: Tensor,
    level_offsets: Tensor,
    resolutions: Tensor,
    smoothstep: bool,
    placements: Tensor | None,
) -> None:
    check_flag(op, "smoothstep", smoothstep)
    flat = placements is not None and isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] == 2
    check_tensor(op, "positions", positions, ["n_samples", 2 if flat else 3])
    check_tensor(op, "table", table, ["n_rows", "n_features"], like=positions, same_dtype=True)
    if table.shape[1] not in FEATURES:
        raise ValueError(f"{op}: table must have 1, 2, 4 or 8 columns, got {list(table.shape)}")
    check_tensor(op, "resolutions", resolutions, ["n_levels"], dtypes=[torch.int32], like=positions)
    n_levels = resolutions.shape[0]
    if n_levels < 1:
        raise ValueError(f"{op}: resolutions must have at least one level, got none")
    check_tensor(op, "level_offsets", level_offsets, [n_levels + 1], dtypes=[torch.int64], like=positions)
    check_placements(op, placements, n_levels, positions)


def _in_space(positions: Tensor) -> Tensor:
    """With a third coordinate, which placements of two dimensions ignore."""
    return F.pad(positions, (0, 3 - positions.shape[1])) if positions.shape[1] < 3 else positions


def check_levels(level_offsets: Tensor, resolutions: Tensor, n_rows: int, placements: Tensor | None) -> None:
    """On the CPU alone, and inside the ops, where tensors have values."""
    check_placed(placements)
    if level_offsets.device.type != "cpu":
        return
    offsets, finenesses = level_offsets.tolist(), resolutions.tolist()
    if offsets[0] != 0 or offsets[-1] != n_rows or any(a >= b for a, b in itertools.pairwise(offsets)):
        raise ValueError(f"hash_grid: level_offsets must rise from 0 to the rows of the table, {n_rows}, got {offsets}")
    if min(finenesses) < 1 or max(finenesses) > 2**24:
        raise ValueError(f"hash_grid: resolutions must lie in [1, 2^24], got {finenesses}")


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, and aligned for the widest loads, which a view into a buffer need not be."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _levels(
    levels: tuple[Tensor, Tensor, Tensor | None], n_rows: int, n_samples: int, n_features: int, smoothstep: bool
) -> tuple[int, ...]:
    """The first argument of every native function."""
    sizes = (n_rows, n_samples, levels[1].shape[0], n_features, smoothstep)
    return *(pointer(tensor) for tensor in levels), *sizes


def _contiguous(
    level_offsets: Tensor, resolutions: Tensor, placements: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The levels as the native core reads them. To be kept until it has been called."""
    placements = None if placements is None else placements.contiguous()
    return level_offsets.contiguous(), resolutions.contiguous(), placements


@torch.library.custom_op("dreamfusion_fast::hash_grid", mutates_args=())
def _forward(
    positions: Tensor,
    table: Tensor,
    level_offsets: Tensor,
    resolutions: Tensor,
    smoothstep: bool,
    placements: Tensor | None,
) -> Tensor:
    check_levels(level_offsets, resolutions, table.shape[0], placements)
    n_samples, (n_rows, n_features) = positions.shape[0], table.shape
    positions, table = positions.contiguous(), _aligned(table)
    kept = _contiguous(level_offsets, resolutions, placements)
    output = positions.new_empty(n_samples, resolutions.shape[0] * n_features)
    levels = _levels(kept, n_rows, n_samples, n_features, smoothstep)
    call("hash_grid_encode", positions, levels, 0, pointer(positions), pointer(table), pointer(output))
    return output


@_forward.register_fake
def _(positions: Tensor, table: Tensor, level_offsets: Tensor, resolutions: Tensor, *_: Any) -> Tensor:
    return positions.new_empty(positions.shape[0], resolutions.shape[0] * table.shape[1])


@torch.library.custom_op("dreamfusion_fast::hash_grid_backward_table", mutates_args=())
def _backward_table(
    grad_output: Tensor,
    positions: Tensor,
    n_rows: int,
    level_offsets: Tensor,
    resolutions: Tensor,
    smoothstep: bool,
    placements: Tensor | None,
) -> Tensor:
    check_levels(level_offsets, resolutions, n_rows, placements)
    n_samples, n_features = positions.shape[0], grad_output.shape[1] // resolutions.shape[0]
    positions, grad_output = positions.contiguous(), _aligned(grad_output)
    kept = _contiguous(level_offsets, resolutions, placements)
    grad_table = positions.new_zeros(n_rows, n_features)
    tensors = (pointer(grad_output), pointer(positions), pointer(grad_table))
    levels = _levels(kept, n_rows, n_samples, n_features, smoothstep)
    call("hash_grid_table_gradient", positions, levels, 0, *tensors)
    return grad_table


@_backward_table.register_fake
def _(grad_output: Tensor, positions: Tensor, n_rows: int, offsets: Tensor, resolutions: Tensor, *_: Any) -> Tensor:
    return positions.new_empty(n_rows, grad_output.shape[1] // resolutions.shape[0])


@torch.library.custom_op("dreamfusion_fast::hash_grid_backward_positions", mutates_args=())
def _backward_positions(
    grad_output: Tensor,
    positions: Tensor,
    table: Tensor,
    level_offsets: Tensor,
    resolutions: Tensor,
    smoothstep: bool,
    placements: Tensor | None,
) -> Tensor:
    check_levels(level_offsets, resolutions, table.shape[0], placements)
    n_samples, (n_rows, n_features) = positions.shape[0], table.shape
    positions, table, grad_output = positions.contiguous(), _aligned(table), _aligned(grad_output)
    kept = _contiguous(level_offsets, resolutions, placements)
    grad_positions = positions.new_empty(positions.shape)
    tensors = (pointer(grad_output), pointer(positions), pointer(table), pointer(grad_positions))
    levels = _levels(kept, n_rows, n_samples, n_features, smoothstep)
    call("hash_grid_position_gradient", positions, levels, 0, *tensors)
    return grad_positions


@_backward_positions.register_fake
def _(grad_output: Tensor, positions: Tensor, *_: Any) -> Tensor:
    return positions.new_empty(positions.shape)


@torch.library.custom_op("dreamfusion_fast::hash_grid_backward_backward", mutates_args=())
def _backward_backward(
    direction: Tensor,
    grad_output: Tensor,
    positions: Tensor,
    table: Tensor,
    level_offsets: Tensor,
    resolutions: Tensor,
    smoothstep: bool,
    placements: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``sum(direction * _backward_positions(...))``; empty where `needs` says that one is not needed."""
    check_levels(level_offsets, resolutions, table.shape[0], placements)
    n_samples, (n_rows, n_features) = positions.shape[0], table.shape
    direction, positions = direction.contiguous(), positions.contiguous()
    grad_output, table = _aligned(grad_output), _aligned(table)
    kept = _contiguous(level_offsets, resolutions, placements)
    to_output, to_table, to_positions = _empty_where_not(needs, grad_output, table, positions)
    to_table.zero_()
    levels = _levels(kept, n_rows, n_samples, n_features, smoothstep)
    d, g, p, w = pointer(direction), pointer(grad_output), pointer(positions), pointer(table)
    if needs[0]:
        call("hash_grid_encode", positions, levels, d, p, w, pointer(to_output))
    if needs[1]:
        call("hash_grid_table_gradient", positions, levels, d, g, p, pointer(to_table))
    if needs[2]:
        call("hash_grid_position_gradient", positions, levels, d, g, p, w, pointer(to_positions))
    return to_output, to_table, to_positions


def _empty_where_not(needs: Sequence[bool], *like: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape if need else (0,)) for tensor, need in zip(like, needs, strict=True))


@_backward_backward.register_fake
def _(direction: Tensor, *tensors_and_needs: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_output, positions, table, *_, needs = tensors_and_needs
    to_output, to_table, to_positions = _empty_where_not(needs, grad_output, table, positions)
    return to_output, to_table, to_positions


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    positions, table, level_offsets, resolutions, ctx.smoothstep, placements = inputs
    # The table is linear in the encoding: its own gradient does not need it, and need not keep it alive.
    kept = table if ctx.needs_input_grad[0] else None
    ctx.n_rows = table.shape[0]
    ctx.save_for_backward(positions, kept, level_offsets, resolutions, placements)


def _forward_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    positions, table, *levels, placements = ctx.saved_tensors
    levels = [*levels, ctx.smoothstep, placements]
    to_positions = to_table = None
    if ctx.needs_input_grad[0]:
        to_positions = _backward_positions(grad_output, positions, table, *levels)
    if ctx.needs_input_grad[1]:
        to_table = _backward_table(grad_output, positions, ctx.n_rows, *levels)
    return to_positions, to_table, None, None, None, None


_forward.register_autograd(_forward_backward, setup_context=_save_forward)


def _save_backward_table(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, positions, _, level_offsets, resolutions, ctx.smoothstep, placements = inputs
    ctx.save_for_backward(grad_output, positions, level_offsets, resolutions, placements)


def _backward_table_backward(ctx: Any, grad_table: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient to the table is the transpose of the encoding, so that its own backward is the encoding again."""
    grad_output, positions, *levels, placements = ctx.saved_tensors
    levels = [*levels, ctx.smoothstep, placements]
    to_output = to_positions = None
    if ctx.needs_input_grad[0]:
        to_output = _forward(positions, grad_table, *levels)
    if ctx.needs_input_grad[1]:
        to_positions = _backward_positions(grad_output, positions, grad_table, *levels)
    return to_output, to_positions, None, None, None, None, None


_backward_table.register_autograd(_backward_table_backward, setup_context=_save_backward_table)


def _save_backward_positions(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.smoothstep, placements = inputs
    ctx.save_for_backward(*tensors, placements)


def _backward_positions_backward(ctx: Any, direction: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    *tensors, placements = ctx.saved_tensors
    wanted = [needs[0], needs[2], needs[1]]
    gradients = _backward_backward(direction, *tensors, ctx.smoothstep, placements, wanted)
    to_output, to_table, to_positions = gradients
    chosen = (x if need else None for x, need in zip((to_output, to_positions, to_table), needs, strict=True))
    return *chosen, None, None, None, None


_backward_positions.register_autograd(_backward_positions_backward, setup_context=_save_backward_positions)


def hash_grid_reference(
    positions: Tensor,
    table: Tensor,
    level_offsets: Tensor,
    resolutions: Tensor,
    smoothstep: bool = False,
    placements: Tensor | None = None,
) -> Tensor:
    """The PyTorch twin of `hash_grid`: any float dtype, any device, differentiable any number of times.

    With placements for as many dimensions as positions have, up to 7.
    """
    features = []
    # Not by tolist, which fails within torch.func.grad in torch 2.6 and older.
    bounds, sizes = ([int(number) for number in numbers.cpu()] for numbers in (level_offsets, resolutions))
    if placements is None:
        placed = [[float(n), 0.0, 0.0, n, n - 1, n + 1, 1] for n in sizes]
    else:
        placed = [[float(number) for number in row] for row in placements.detach().cpu()]
    for level, placement in enumerate(placed):
        level_table = table[bounds[level] : bounds[level + 1]]
        cell, upper = placed_cells(positions, placement)
        if smoothstep:
            upper = upper * upper * (3 - 2 * upper)
        weights = (1 - upper, upper)
        dims = positions.shape[1]
        encoded = table.new_zeros(positions.shape[0], table.shape[1])
        for corner in range(2**dims):
            steps = [corner >> axis & 1 for axis in range(dims)]
            weight = weights[steps[0]][:, 0]
            for axis in range(1, dims):
                weight = weight * weights[steps[axis]][:, axis]
            vertices = [cell[:, axis] + steps[axis] for axis in range(dims)]
            rows = vertex_rows(vertices, int(placement[5]), placement[6] > 0, level_table.shape[0])
            encoded = encoded + weight.unsqueeze(1) * level_table[rows]
        features.append(encoded)
    return torch.cat(features, 1)


@contextmanager
def differentiable(positions: Tensor) -> Iterator[Tensor]:
    """The positions as what a result may be differentiated by, with gradients on, in whatever mode the caller is."""
    with torch.inference_mode(False), torch.enable_grad():
        points = positions.clone() if positions.is_inference() else positions
        yield points if points.requires_grad else points.detach().requires_grad_(True)


def hash_grid_position_gradient_reference(grad_output: Tensor, positions: Tensor, *grid: Any) -> Tensor:
    """The PyTorch twin of `hash_grid_position_gradient`: differentiable any number of times."""
    if torch._C._are_functorch_transforms_active():  # of which autograd's own functions take no part
        return torch.func.vjp(lambda positions: hash_grid_reference(positions, *grid), positions)[1](grad_output)[0]
    keep_graph = torch.is_grad_enabled()
    # Not by torch.func, which refuses saved tensor hooks of the caller.
    with differentiable(positions) as points:
        features = hash_grid_reference(points, *grid)
        (gradient,) = torch.autograd.grad(features, points, grad_output, create_graph=keep_graph)
    return gradient
