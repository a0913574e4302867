"""The input of every way to march: the rays with their grid as the native core takes them, and their counts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dreamfusion_fast.ops._native import call, pointer

_BLOCK = 8  # cells along a block (kBlock in march.h)


@dataclass(frozen=True, eq=False)
class MarchedRays:
    """Rays and the grid they are marched through, as `march` takes them; all tensors contiguous, on one device.

    Attributes:
        origins, directions: `[n_rays, 3]`.
        t_near, t_far: `[n_rays]`, as `ray_box` gives them.
        aabb: `[6]`.
        bitfield: uint8, or None: all cells are occupied.
        blocks: from `occupied_blocks`; None without bitfield.
        resolution, step, jitter, cascades: as in `march`.
        seed: as in `march`, or an int64 tensor `[]` on the device, which a CUDA graph reads anew at each replay.
        distances: `[n + 1]` as in `march_lattice`, or None: equal steps.
    """

    origins: Tensor
    directions: Tensor
    t_near: Tensor
    t_far: Tensor
    aabb: Tensor
    bitfield: Tensor | None
    blocks: Tensor | None
    resolution: int
    step: float
    jitter: bool
    seed: int | Tensor
    cascades: int = 1
    distances: Tensor | None = None

    def __len__(self) -> int:
        return self.origins.shape[0]

    @cached_property
    def arguments(self) -> tuple[int | float | bool, ...]:
        """The first arguments of the native march functions."""
        tensors = (self.origins, self.directions, self.t_near, self.t_far, self.aabb, self.distances)
        n_steps = 0 if self.distances is None else self.distances.shape[0] - 1
        grid = (pointer(self.bitfield), pointer(self.blocks), self.resolution, self.cascades)
        seed = (0, pointer(self.seed)) if isinstance(self.seed, Tensor) else (self.seed, 0)
        return (*map(pointer, tensors), n_steps, *grid, self.step, self.jitter, *seed, len(self))


def occupied_blocks(bitfield: Tensor, resolution: int, cascades: int = 1) -> Tensor:
    """Which blocks of 8^3 cells hold an occupied one, uint8 `[cascades * ceil(resolution / 8)^3]`."""
    blocks = bitfield.new_empty(cascades * ((resolution + _BLOCK - 1) // _BLOCK) ** 3)
    call("march_blocks", bitfield, pointer(bitfield), resolution, cascades, pointer(blocks))
    return blocks


def count_samples(rays: MarchedRays) -> tuple[Tensor, Tensor]:
    """Samples of each ray, and the number k of its first one: int32 `[n_rays]` each."""
    counts, firsts = rays.origins.new_empty((2, len(rays)), dtype=torch.int32)
    if len(rays) > 0:
        call("march_count", rays.origins, *rays.arguments, pointer(counts), pointer(firsts))
    return counts, firsts
