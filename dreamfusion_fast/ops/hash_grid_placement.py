"""How the levels of a hash grid lie in space, where they do not lie as `hash_grid_layout` makes them.

Other libraries put vertices elsewhere than at multiples of 1/N, count them differently, or let rows wrap. All of it is
a few numbers per level. With a position x, a level has the vertex coordinates

    u = clamp(x * scale + shift, low, high),    cell = min(floor(u), last_cell),

and vertex (i_0, i_1, ...) has the row ``sum_d i_d s_d mod rows``, with the strides s_0 = 1, s_d+1 = side s_d as long as
they do not exceed the rows, and 0 from there on. A level that hashes uses ``xor_d (i_d p_d) mod rows`` in its place if
side^dims exceeds the rows. All integers are unsigned and of 32 bits, with what overflows there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dreamfusion_fast.ops._checks import check_flag, check_number, check_tensor, shown

PRIMES = (1, 2654435761, 805459861, 3674653429, 2097192037, 1434869437, 2165219737)
COLUMNS = 8  # of a placement: scale, shift, low, high, last_cell, side, hashes, dims
FAR = 2.0**30  # beyond this many cells from the origin, positions are clamped in any case
_UINT32 = 0xFFFFFFFF


def hash_grid_placements(
    scales: Sequence[float],
    sides: Sequence[int],
    shift: float = 0.0,
    highest: Sequence[int] | None = None,
    hashes: bool = True,
    dims: int = 3,
) -> Tensor:
    """The placements that `hash_grid` takes.

    Args:
        scales: of each level, cells per unit, at least 0.
        sides: of each level, vertices along an axis as rows are counted, 1 to 2^24.
        shift: of the vertices, in cells, within [-1, 1].
        highest: of each level, the last vertex of an axis, to which positions are clamped, as they are to vertex 0.
            None: positions are not clamped, and the grid has no end; its rows repeat.
        hashes: whether levels with more vertices than rows are hashed; else their rows repeat.
        dims: of positions, 2 to 7 (the native core knows 2 and 3).

    Returns:
        ``[n_levels, 8]`` float32, on the CPU.

    Raises:
        TypeError, ValueError: a number of the wrong kind or out of its range, or lists of different lengths.
    """
    op = "hash_grid_placements"
    check_number(op, "dims", dims, "between 2 and 7", lambda number: 2 <= number <= len(PRIMES), whole=True)
    check_number(op, "shift", shift, "between -1 and 1", lambda number: -1 <= number <= 1)
    check_flag(op, "hashes", hashes)
    for name, values in (("scales", scales), ("sides", sides), ("highest", scales if highest is None else highest)):
        if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
            raise TypeError(f"{op}: {name} must be a list of numbers, got {shown(values)}")
        if len(values) != len(scales):
            raise ValueError(f"{op}: {name} must be as many as scales, {len(scales)}, got {len(values)}")
    rows = []
    for level, (scale, side) in enumerate(zip(scales, sides, strict=True)):
        name = f"scales[{level}]"
        check_number(op, name, scale, "at least 0 and at most 2^24", lambda number: 0 <= number <= 2**24)
        name = f"sides[{level}]"
        check_number(op, name, side, "at least 1 and at most 2^24", lambda number: 1 <= number <= 2**24, whole=True)
        low, high, last = -FAR, FAR, FAR
        if highest is not None:
            name, end = f"highest[{level}]", highest[level]
            check_number(op, name, end, "at least 0 and at most 2^24", lambda number: 0 <= number <= 2**24, whole=True)
            low, high, last = 0.0, float(end), float(max(end - 1, 0))
        rows.append([float(scale), float(shift), low, high, last, float(side), float(bool(hashes)), float(dims)])
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, COLUMNS)


def check_placements(op: str, placements: Tensor | None, n_levels: int, like: Tensor) -> None:
    """Raises TypeError or ValueError unless the tensor has the form that `hash_grid_placements` gives it."""
    if placements is not None:
        check_tensor(op, "placements", placements, [n_levels, COLUMNS], dtypes=[torch.float32], like=like)


def check_placed(placements: Tensor | None) -> None:
    """On the CPU alone, and inside the ops: that all numbers are ones that `hash_grid_placements` can give."""
    if placements is None or placements.device.type != "cpu":
        return
    p = placements.double()
    scale, _, low, high, last, side, _, dims = p.unbind(1)
    fits = p.isfinite().all() and (p.abs() <= FAR).all() and (scale >= 0).all() and (low <= high).all()
    if not (fits and (last >= 0).all() and (side >= 1).all() and (dims >= 2).all()):
        raise ValueError("hash_grid: placements must be those of hash_grid_placements, got others")


def vertex_rows(vertices: Sequence[Tensor], side: int, hashes: bool, rows: int) -> Tensor:
    """The row, within its level, of integer vertices: an int64 tensor per axis, all of one shape; any may be negative.

    In plain PyTorch, for the twin and for what walks over vertices.
    """
    index, stride = torch.zeros_like(vertices[0]), 1
    for vertex in vertices:
        if stride > rows:
            break
        index = index + (vertex & _UINT32) * stride & _UINT32
        stride = stride * side & _UINT32
    if hashes and stride > rows:
        index = torch.zeros_like(index)
        for vertex, prime in zip(vertices, PRIMES, strict=False):
            index = index ^ ((vertex & _UINT32) * prime & _UINT32)
    return index % rows


def placed_cells(positions: Tensor, placement: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The cells of positions in a level, int64, and how far in them positions are: both ``[n, dims]``.

    The latter is differentiable; a NaN stays one, in cell 0.
    """
    scale, shift, low, high, last, *_ = placement
    placed = positions * scale + shift
    # Not clamp alone, which cuts off the gradient of a NaN.
    placed = torch.where(placed.isnan(), placed, placed.clamp(low, high))
    cell = placed.detach().floor().clamp(max=last).nan_to_num()
    return cell.long(), placed - cell
