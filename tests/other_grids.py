"""The hash grids of other libraries, corner by corner in Python's own numbers: what placements are held to.

Written from what their kernels compute, with the scale of a level in float32, as they have it, and all else in float64.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

PRIMES = (1, 2654435761, 805459861, 3674653429, 2097192037)


def level_scale(level: int, per_level_scale: float, base_resolution: int, single: bool = False) -> np.float32:
    """2^(level log2(growth)) base, in float32; `single`: with the logarithm, too, in that type."""
    growth = np.log2(np.float32(per_level_scale)) if single else np.float32(np.log2(per_level_scale))
    return np.exp2(np.float32(level) * growth) * np.float32(base_resolution)


def row_of(vertex: list[int], side: int, rows: int, hashed: bool) -> int:
    """The loop that they share: strides as long as they do not exceed the rows, all of it in 32 bits."""
    stride, index = 1, 0
    for coordinate in vertex:
        if stride > rows:
            break
        index = (index + coordinate * stride) % 2**32
        stride = stride * side % 2**32
    if hashed and stride > rows:
        index = 0
        for coordinate, prime in zip(vertex, PRIMES, strict=False):
            index ^= coordinate * prime % 2**32
    return index % rows


def interpolated(
    cell: list[int], upper: list[float], table: np.ndarray, side: int, hashed: bool, smooth: bool, last: int | None
) -> np.ndarray:
    result = np.zeros(table.shape[1])
    weights = [u * u * (3 - 2 * u) if smooth else u for u in upper]
    for corner in itertools.product((0, 1), repeat=len(cell)):
        vertex, weight = [], 1.0
        for c, step, w in zip(cell, corner, weights, strict=True):
            vertex.append((c + step if last is None else min(c + step, last)) % 2**32)
            weight *= w if step else 1 - w
        result += weight * table[row_of(vertex, side, len(table), hashed)]
    return result


def grid_encoder(
    positions: np.ndarray,
    table: np.ndarray,
    offsets: list[int],
    per_level_scale: float,
    base_resolution: int,
    gridtype: str = "hash",
    align_corners: bool = False,
    interpolation: str = "linear",
    flavour: str = "stable-dreamfusion",
) -> np.ndarray:
    """gridencoder: positions in [0, 1]; zeros where one is not."""
    out = []
    for x in positions:
        features: list[float] = []
        for level, (begin, end) in enumerate(itertools.pairwise(offsets)):
            rows = table[begin:end]
            if any(c < 0 or c > 1 for c in x):
                features.extend([0.0] * table.shape[1])
                continue
            scaled = level_scale(level, per_level_scale, base_resolution)
            last: int | None
            if flavour == "stable-dreamfusion":
                n = math.ceil(scaled)
                side, last = n, n - 1
                if align_corners:
                    u = [c * (n - 1) for c in x]
                    cell = [min(math.floor(c), n - 2) for c in u]
                else:
                    u = [min(max(c * n - 0.5, 0.0), n - 1.0) for c in x]
                    cell = [math.floor(c) for c in u]
            else:
                scale = scaled - np.float32(1)
                n = math.ceil(scale) + 1
                side, last = (n if align_corners else n + 1), None
                u = [c * float(scale) + (0.0 if align_corners else 0.5) for c in x]
                cell = [math.floor(c) for c in u]
            upper = [a - b for a, b in zip(u, cell, strict=True)]
            smooth = interpolation == "smoothstep"
            features.extend(interpolated(cell, upper, rows, side, gridtype == "hash", smooth, last))
        out.append(features)
    return np.array(out).reshape(len(positions), (len(offsets) - 1) * table.shape[1])


def tiny_cuda_nn(
    positions: np.ndarray,
    table: np.ndarray,
    offsets: list[int],
    per_level_scale: float,
    base_resolution: int,
    hashed: bool = True,
    smooth: bool = False,
) -> np.ndarray:
    """tiny-cuda-nn's grid encoding: nothing is clamped."""
    out = []
    for x in positions:
        features: list[float] = []
        for level, (begin, end) in enumerate(itertools.pairwise(offsets)):
            scale = level_scale(level, per_level_scale, base_resolution, single=True) - np.float32(1)
            side = math.ceil(scale) + 1
            u = [c * float(scale) + 0.5 for c in x]
            cell = [math.floor(c) for c in u]
            upper = [a - b for a, b in zip(u, cell, strict=True)]
            features.extend(interpolated(cell, upper, table[begin:end], side, hashed, smooth, None))
        out.append(features)
    return np.array(out).reshape(len(positions), (len(offsets) - 1) * table.shape[1])
