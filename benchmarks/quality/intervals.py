"""Means and shares over prompts, with confidence intervals of 95 %.

The prompt is the unit: seeds of one prompt are averaged first, since they succeed and fail together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959964
_DRAWS = 10_000


def wilson(share: float, count: int) -> tuple[float, float]:
    """The interval of a share that was seen in `count` independent cases (Wilson 1927)."""
    if count == 0:
        return 0.0, 1.0
    centre = share + Z * Z / (2 * count)
    spread = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    whole = 1 + Z * Z / count
    return max(0.0, (centre - spread) / whole), min(1.0, (centre + spread) / whole)


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """The interval of the mean of `values`, by drawing them again with replacement; the same values give the same."""
    array = np.asarray(values, np.float64)
    if len(array) == 0:
        return math.nan, math.nan
    draws = np.random.default_rng(0).integers(len(array), size=(_DRAWS, len(array)))
    low, high = np.quantile(array[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)


def share(values: Sequence[float]) -> dict[str, float]:
    """Mean of shares, one per prompt, with Wilson's interval for as many cases as there are prompts."""
    mean = float(np.mean(values)) if len(values) else math.nan
    low, high = wilson(mean, len(values)) if len(values) else (math.nan, math.nan)
    return {"mean": mean, "low": low, "high": high, "prompts": len(values)}


def mean(values: Sequence[float]) -> dict[str, float]:
    """Mean of anything, one value per prompt, with the bootstrap's interval."""
    low, high = bootstrap(values)
    return {
        "mean": float(np.mean(values)) if len(values) else math.nan,
        "low": low,
        "high": high,
        "prompts": len(values),
    }
