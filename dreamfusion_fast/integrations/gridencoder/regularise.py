"""gridencoder's regularisers, which add to the gradient of a table in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dreamfusion_fast.integrations.gridencoder.geometry import Geometry, inside, placements_of
from dreamfusion_fast.ops.hash_grid_placement import placed_cells, vertex_rows


@torch.no_grad()
def add_total_variation(
    grad: Tensor, positions: Tensor, table: Tensor, offsets: Sequence[int], geometry: Geometry, weight: float
) -> None:
    """Adds w / (2 d) sum_j (v - v_j) / sqrt(sum_j (v - v_j)^2 + 1e-9) to the row of v, for each position and level.

    v is the lower vertex of the position's cell and v_j are its neighbours along the d axes, of which those below 0 or
    above the resolution are left out. Per feature.

    Args:
        grad: ``[rows, features]``, added to.
        positions: ``[n, d]``; those outside [0, 1] add nothing.
        table: ``[rows, features]``.
        offsets: first row of each level, and last the rows.
        geometry: of the levels.
        weight: w.
    """
    positions = positions[inside(positions)]
    dims = positions.shape[1]
    for level, placement in enumerate(placements_of(geometry, torch.device("cpu"))[1].tolist()):
        begin, rows = offsets[level], offsets[level + 1] - offsets[level]
        high, side, hashes = placement[3], int(placement[5]), placement[6] > 0
        clamped = geometry.flavour == "stable-dreamfusion"
        if clamped and not geometry.align_corners:  # its last cell begins at the last vertex
            placement[4] = high
        most = side if clamped or geometry.align_corners else side - 1  # the resolution
        cells = placed_cells(positions, placement)[0].unbind(1)
        index = begin + vertex_rows(cells, side, hashes, rows)
        own = table[index]
        total, squares = torch.zeros_like(own), torch.zeros_like(own)
        for axis in range(dims):
            for step, there in ((1, cells[axis] < most), (-1, cells[axis] > 0)):
                neighbour = [cell + step * (other == axis) for other, cell in enumerate(cells)]
                its_value = table[begin + vertex_rows(neighbour, side, hashes, rows)]
                difference = torch.where(there.unsqueeze(1), own - its_value, 0)
                total += difference
                squares += difference.square()
        grad.index_add_(0, index, (weight / (2 * dims) * total * (squares + 1e-9).rsqrt()).to(grad.dtype))


@torch.no_grad()
def add_weight_decay(grad: Tensor, table: Tensor, offsets: Tensor, weight: float) -> None:
    """Adds 2 w v / rows to each value's gradient, with the rows of its level (Barron et al. 2023, "Zip-NeRF").

    Args:
        grad, table: ``[rows, features]``; grad is added to.
        offsets: first row of each level, and last the rows.
        weight: w.
    """
    rows = offsets.long().diff().to(table.device)
    grad += (2 * weight * table / rows.repeat_interleave(rows).unsqueeze(1)).to(grad.dtype)
