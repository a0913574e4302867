"""DreamTime's importance of diffusion times (Huang et al. 2023, arXiv 2306.12422)."""

from __future__ import annotations

import functools
from bisect import bisect_left

import torch
from torch import Tensor

DREAMTIME = (0.8, 0.5, 0.3, 0.1)
"""The authors' m1, m2, s1, s2 as fractions of the schedule; theirs are 800, 500, 300, 100 of 1000 timesteps."""

_STEPS = 1000  # of the sums below; a schedule of so many timesteps gets each of its own


def importance(time: Tensor, shape: tuple[float, float, float, float] = DREAMTIME) -> Tensor:
    """W(t) without its normalisation: exp(-(t - m1)^2 / 2 s1^2) above m1, exp(-(t - m2)^2 / 2 s2^2) below m2, else 1.

    Args:
        time: fractions of the schedule.
        shape: m1, m2, s1, s2, fractions of the schedule, m2 <= m1.
    """
    m1, m2, s1, s2 = shape
    above, below = (time - m1).clamp_min(0) / s1, (m2 - time).clamp_min(0) / s2
    return torch.exp(-0.5 * (above.square() + below.square()))


def time_of(progress: float, t_min: float, t_max: float, shape: tuple[float, float, float, float] = DREAMTIME) -> float:
    """t(i) = argmin_t' |sum of p(t) for t >= t' - i / N|, p(t) = W(t) / sum W: it falls, slowly where W is large.

    Args:
        progress: i / N.
        t_min, t_max: fractions of the schedule between which p is not 0.
        shape: as `importance` has it.

    Returns:
        A fraction of the schedule, between t_min and t_max.
    """
    times, sums = _tail_sums(t_min, t_max, shape)
    after = bisect_left(sums, progress)
    if after == len(sums):
        return times[-1]
    before = max(after - 1, 0)
    return times[before] if progress - sums[before] <= sums[after] - progress else times[after]


@functools.lru_cache(maxsize=8)
def _tail_sums(t_min: float, t_max: float, shape: tuple[float, float, float, float]) -> tuple[list[float], list[float]]:
    """Times from the largest to the smallest, and the sums of p from the largest down to each, which rise to 1."""
    first, last = round(t_min * _STEPS), round(t_max * _STEPS)
    times = torch.arange(last, first - 1, -1, dtype=torch.float64) / _STEPS
    weights = importance(times, shape)
    sums = (weights.cumsum(0) / weights.sum()).tolist()
    return times.tolist(), sums
