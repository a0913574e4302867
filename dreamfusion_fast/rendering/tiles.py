"""How samples are cut into tiles that fit a budget of memory, and which rays each tile has: all on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A GPU is full from about 2^18 samples on; more only saves launches. On a CPU a tile should stay in the caches.
_LARGEST_TILE = {"cpu": 1 << 14, "cuda": 1 << 20}
SMALLEST_TILE = 1 << 10
# Rounded up to this, so that each plane of a tile starts aligned and GPU blocks come out even.
_GRANULE = 1 << 10
# Workspace of a render where no budget is given: at most this part of what is free, and this much.
_FREE_PART = 8
_DEFAULT_BYTES = 128 << 20


def default_budget(device: torch.device) -> int:
    """Bytes of workspace for a render on `device` where nobody says how many."""
    if device.type != "cuda":
        return _DEFAULT_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min((free + cached) // _FREE_PART, _DEFAULT_BYTES)


def tile_size(bytes_per_sample: int, budget: int, samples: int, device: torch.device) -> int:
    """Samples per tile: a power of two within the budget, no larger than it takes to hold `samples` in one."""
    largest = min(max(budget // bytes_per_sample, SMALLEST_TILE), _LARGEST_TILE.get(device.type, 1 << 20))
    size = 1 << (largest.bit_length() - 1)
    return min(size, max(-(-samples // _GRANULE), 1) * _GRANULE)


@dataclass(frozen=True, eq=False)
class TileTable:
    """What the kernels read about each tile; nothing of it is known on the host.

    Attributes:
        size: samples per tile.
        ray_ranges: int32 `[n_tiles, 2]`, rays with samples in the tile: first, and one past the last.
        counts: int32 `[n_tiles, 1]`, samples in the tile.
    """

    size: int
    ray_ranges: Tensor
    counts: Tensor

    @classmethod
    def of(cls, offsets: Tensor, size: int, n_tiles: int) -> TileTable:
        """The first `n_tiles` tiles of packed samples with `offsets` int32 `[n_rays + 1]`."""
        starts = torch.arange(0, n_tiles * size, size, device=offsets.device)
        ends = starts + size
        # The first ray that ends behind the start, and the first one that begins at the end or behind it.
        low = torch.searchsorted(offsets[1:], starts, right=True, out_int32=True)
        high = torch.searchsorted(offsets[:-1], ends, out_int32=True)
        counts = (offsets[-1] - starts).clamp(0, size).to(torch.int32)
        return cls(size, torch.stack((low, high), dim=1), counts[:, None])
