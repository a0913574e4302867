"""The rules of marching through a grid in Morton order, written out for one ray in Python's doubles."""

from __future__ import annotations

import math

Samples = list[tuple[list[float], float, float]]


def interleaved(cell: list[int]) -> int:
    """The Morton index, bit by bit."""
    return sum((cell[axis] >> bit & 1) << 3 * bit + axis for bit in range(10) for axis in range(3))


def written_out(
    origin: list[float],
    direction: list[float],
    near: float,
    far: float,
    occupied: list[list[bool]],
    bound: float,
    size: int,
    dt_gamma: float,
    max_steps: int,
    limit: int,
    longest: float,
    noise: float = 0.0,
    contract: bool = False,
) -> Samples:
    """Position, end and length of each sample of one ray, by the rules that torch-ngp's forks share."""
    shortest, longest = 2 * math.sqrt(3) / max_steps, 2 * math.sqrt(3) * longest / size
    levels = len(occupied)

    def step(t: float) -> float:
        return min(max(t * dt_gamma, shortest), longest)

    found: Samples = []
    t = near + noise * step(near)
    while t < far and len(found) < limit:
        dt = step(t)
        p = [min(max(o + t * d, -bound), bound) for o, d in zip(origin, direction, strict=True)]
        largest = max(abs(x) for x in p)
        level = 0
        while level < levels - 1 and (largest >= 2**level or dt * size / 2 >= 2**level):
            level += 1
        half = min(2**level, bound)
        drawn_in = contract and largest > 1
        if drawn_in:
            p = [x * (2 - 1 / largest) / largest for x in p]
        cell = [min(max(int((x / half + 1) / 2 * size), 0), size - 1) for x in p]
        if occupied[level][interleaved(cell)]:
            found.append((p, t + dt, dt))
            t += dt
        elif drawn_in:
            t += dt
        else:
            exits = [
                ((c + (d > 0)) / size * 2 * half - half - x) / d for c, x, d in zip(cell, p, direction, strict=True)
            ]
            leave = t + max(0.0, min(exits))
            t += dt
            while t < leave:
                t += step(t)
    return found
