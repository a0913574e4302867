"""Multiresolution hash grid encoding (Müller et al. 2022, "Instant Neural Graphics Primitives", section 3)."""

import torch
from torch import Tensor

PRIME_Y = 2654435761
PRIME_Z = 805459861


def hash_grid_layout(
    levels: int, base_resolution: int, finest_resolution: int, log2_rows: int
) -> tuple[Tensor, Tensor]:
    """Where each level of a hash grid lives in its table, and how fine it is.

    Resolutions form a geometric progression from ``base_resolution`` to ``finest_resolution`` (Müller et al. 2022, eq. 2 and 3).
    A level with resolution N gets ``min((N + 1)^3, 2^log2_rows)`` rows, rounded up to a multiple of 8.

    Returns:
        ``level_offsets`` int64 ``[levels + 1]``, the first row of each level and the number of rows of the table, and
        ``resolutions`` int32 ``[levels]``.

    Raises:
        ValueError: if a count is out of its range.
    """
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    if not 1 <= base_resolution <= finest_resolution:
        raise ValueError(
            "base_resolution and finest_resolution must fulfil 1 <= base_resolution <= finest_resolution, "
            f"got {base_resolution} and {finest_resolution}"
        )
    if not 3 <= log2_rows <= 30:
        raise ValueError(f"log2_rows must lie in [3, 30], got {log2_rows}")
    growth = (finest_resolution / base_resolution) ** (1.0 / max(levels - 1, 1))
    # The small addition keeps the last level from falling below finest_resolution by the rounding of the power.
    resolutions = [int(base_resolution * growth**level + 1e-6) for level in range(levels)]
    rows = [-(-min((n + 1) ** 3, 2**log2_rows) // 8) * 8 for n in resolutions]
    level_offsets = torch.zeros(levels + 1, dtype=torch.int64)
    level_offsets[1:] = torch.tensor(rows, dtype=torch.int64).cumsum(0)
    return level_offsets, torch.tensor(resolutions, dtype=torch.int32)


def _vertex_rows(x: Tensor, y: Tensor, z: Tensor, resolution: int, rows: int) -> Tensor:
    """Row, within its level, of integer vertices: int64 tensors of one shape."""
    side = resolution + 1
    if side**3 <= rows:
        return x + side * (y + side * z)
    mask = 0xFFFFFFFF
    return (x ^ (y * PRIME_Y & mask) ^ (z * PRIME_Z & mask)) % rows


def hash_grid_reference(
    positions: Tensor, table: Tensor, level_offsets: Tensor, resolutions: Tensor, smoothstep: bool = False
) -> Tensor:
    """The pure-PyTorch twin of :func:`hash_grid`: any float dtype, any device, differentiable any number of times."""
    features = []
    bounds = level_offsets.tolist()
    for level, resolution in enumerate(resolutions.tolist()):
        level_table = table[bounds[level] : bounds[level + 1]]
        scaled = positions.clamp(0, 1) * resolution
        cell = scaled.detach().floor().clamp(max=resolution - 1)
        upper = scaled - cell
        if smoothstep:
            upper = upper * upper * (3 - 2 * upper)
        weights = (1 - upper, upper)
        cell = cell.long()
        encoded = table.new_zeros(positions.shape[0], table.shape[1])
        for corner in range(8):
            dx, dy, dz = corner & 1, corner >> 1 & 1, corner >> 2
            weight = weights[dx][:, 0] * weights[dy][:, 1] * weights[dz][:, 2]
            rows = _vertex_rows(
                cell[:, 0] + dx, cell[:, 1] + dy, cell[:, 2] + dz, resolution, level_table.shape[0]
            )
            encoded = encoded + weight.unsqueeze(1) * level_table[rows]
        features.append(encoded)
    return torch.cat(features, 1)
