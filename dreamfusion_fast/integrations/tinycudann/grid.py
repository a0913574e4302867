"""tiny-cuda-nn's grid: where its vertices lie, and how many rows its levels have.

With S = log2(per_level_scale) and H = base_resolution, level l has the scale s = 2^(l S) H - 1 and N = ceil(s) + 1
vertices along an axis, and a position lies at s x + 1/2, all of it in float32. Nothing is clamped: a position outside
[0, 1] has vertices that are hashed as any others, and rows that are not hashed repeat. So they do at the upper border,
where vertex N is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Generator, Tensor

from dreamfusion_fast.integrations.tinycudann.config import Options
from dreamfusion_fast.ops import hash_grid, hash_grid_reference
from dreamfusion_fast.ops.hash_grid_placement import hash_grid_placements
from dreamfusion_fast.ops.tiles.hash_grid import HashGridTileLayout

_KIND_OF_OTYPE = {"tiledgrid": "Tiled", "densegrid": "Dense"}
_MOST_ROWS = 2**31


@dataclass(frozen=True)
class GridLevels:
    """The levels of a grid, which state its layout.

    Attributes:
        n_dims: of positions, 2 to 4; 2 and 3 by the native kernels, 4 by PyTorch's operations.
        n_levels, n_features: levels, and features of each, 1, 2, 4 or 8.
        per_level_scale, base_resolution: the growth of resolution, and the first one.
        log2_rows: of the most rows of a hashed level.
        kind: "Hash", "Dense" or "Tiled".
    """

    n_dims: int
    n_levels: int
    n_features: int
    per_level_scale: float
    base_resolution: int
    log2_rows: int
    kind: str

    @classmethod
    def read(cls, n_dims: int, options: Options) -> GridLevels:
        """From a configuration. Raises TypeError or ValueError for options that are wrong or not served."""
        if not 2 <= n_dims <= 4:
            raise ValueError(f"{options.where}: takes 2, 3 or 4 inputs, got {n_dims}")
        features = options.number("n_features_per_level", 2, "1, 2, 4 or 8", lambda n: n in (1, 2, 4, 8))
        if "n_features" in options:
            if "n_levels" in options:
                raise ValueError(f"{options.where}: n_features and n_levels say the same, and only one may be given")
            wanted = f"a multiple of n_features_per_level, {features}"
            total = options.number("n_features", 0, wanted, lambda n: n > 0 and n % features == 0)
            n_levels = total // features
        else:
            n_levels = options.number("n_levels", 16, "between 1 and 128", lambda n: 1 <= n <= 128)
        default = _KIND_OF_OTYPE.get(options.otype.lower(), "Hash")
        kinds = {"Hash": "Hash", "Dense": "Dense", "Tiled": "Tiled", "Tile": "Tiled"}
        options.choice("hash", "CoherentPrime", {"CoherentPrime": None})
        if options.flag("stochastic_interpolation", False):
            raise ValueError(f"{options.where}: stochastic_interpolation must be False, got True")
        growth = options.number("per_level_scale", 2.0, "above 0", lambda x: 0 < x < math.inf, whole=False)
        base = options.number("base_resolution", 16, "at least 1", lambda n: 1 <= n <= 2**24)
        log2_rows = options.number("log2_hashmap_size", 19, "between 0 and 30", lambda n: 0 <= n <= 30)
        levels = cls(n_dims, n_levels, features, growth, base, log2_rows, options.choice("type", default, kinds))
        if levels.offsets()[-1] >= _MOST_ROWS:
            raise ValueError(f"{options.where}: the table must have fewer than 2^31 rows, got {levels.offsets()[-1]}")
        return levels

    def scales(self) -> list[float]:
        """Of each level, cells per unit: a float32."""
        growth, base = np.log2(np.float32(self.per_level_scale)), np.float32(self.base_resolution)
        return [float(np.exp2(np.float32(level) * growth) * base - np.float32(1)) for level in range(self.n_levels)]

    def sides(self) -> list[int]:
        """Of each level, vertices along an axis."""
        return [math.ceil(scale) + 1 for scale in self.scales()]

    def offsets(self) -> list[int]:
        """The first row of each level and, last, the rows of the table."""
        offsets = [0]
        for side in self.sides():
            rows = -(-min(side**self.n_dims, _MOST_ROWS) // 8) * 8
            if self.kind == "Hash":
                rows = min(rows, 2**self.log2_rows)
            elif self.kind == "Tiled":
                rows = min(rows, self.base_resolution**self.n_dims)
            offsets.append(offsets[-1] + rows)
        return offsets


@lru_cache(maxsize=256)
def _on(levels: GridLevels, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Level offsets, resolutions and placements, on a device."""
    sides = levels.sides()
    with torch.inference_mode(False):  # they are kept, and may be needed for a gradient later
        hashes = levels.kind == "Hash"
        placements = hash_grid_placements(levels.scales(), sides, 0.5, None, hashes, levels.n_dims)
        resolutions = torch.tensor([max(side - 1, 1) for side in sides], dtype=torch.int32)
        offsets = torch.tensor(levels.offsets(), dtype=torch.int64)
        return offsets.to(device), resolutions.to(device), placements.to(device)


@lru_cache(maxsize=256)
def tile_layout(levels: GridLevels, smoothstep: bool, device: torch.device) -> HashGridTileLayout:
    """The levels as the kernels over tiles take them."""
    offsets, resolutions, placements = _on(levels, device)
    return HashGridTileLayout(offsets, resolutions, smoothstep, placements)


def encode_grid(positions: Tensor, table: Tensor, levels: GridLevels, smoothstep: bool) -> Tensor:
    """The features at positions.

    Args:
        positions: ``[n, n_dims]``, float32 or float64.
        table: ``[rows, n_features]``, of the same type.
        levels: the levels.
        smoothstep: as in `hash_grid`.

    Returns:
        ``[n, n_levels * n_features]``, twice differentiable.
    """
    offsets, resolutions, placements = _on(levels, positions.device)
    run = hash_grid if levels.n_dims in (2, 3) else hash_grid_reference
    return run(positions, table, offsets, resolutions, smoothstep, placements)


def initial_table(size: int, generator: Generator) -> Tensor:
    """``[size]``, uniform in +-1e-4."""
    return torch.rand(size, generator=generator) * 2e-4 - 1e-4
