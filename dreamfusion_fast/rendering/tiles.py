"""How many samples a tile has, so that its workspace fits a budget of memory."""

from __future__ import annotations

import torch

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
