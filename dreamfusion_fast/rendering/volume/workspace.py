"""The buffers of one tile, and how many samples fit into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dreamfusion_fast.fields.tile_source import TileSource
from dreamfusion_fast.gpu.memory import free_bytes
from dreamfusion_fast.ops.tiles.mlp import prepared_forward

# A GPU is full from about 2^18 samples on; more only saves launches. A CPU, too, has work to do once per tile; beyond
# 2^16 samples it is less than the noise of measuring it.
_LARGEST_TILE = {"cpu": 1 << 17, "cuda": 1 << 20}
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
    return min(free_bytes(device) // _FREE_PART, _DEFAULT_BYTES)


def tile_size(bytes_per_sample: int, budget: int, samples: int, device: torch.device) -> int:
    """Samples per tile: a power of two within the budget, no larger than it takes to hold `samples` in one."""
    largest = min(max(budget // bytes_per_sample, SMALLEST_TILE), _LARGEST_TILE[device.type])
    size = 1 << (largest.bit_length() - 1)
    return min(size, max(-(-samples // _GRANULE), 1) * _GRANULE)


class Workspace:
    """Buffers of one tile; on a GPU a plane per channel, on a CPU a row per sample."""

    def __init__(self, size: int, source: TileSource, normals: bool, lengths: bool) -> None:
        self._planes = source.table.device.type == "cuda"
        self._like = source.table.detach()
        self._size = size
        n = source.n_features
        self.t = self._like.new_empty(size)
        self.lengths = self._like.new_empty(size) if lengths else None
        self.positions = self.rows(3)
        self.features = self.rows(n, source.feature_dtype)
        self.logits = self.rows(source.n_outputs)
        self.layout: Any = source.layout  # of the samples of a tile, whose scenes may differ
        self.slopes = self.rows(3) if normals else None
        self.input_gradient = self.rows(n, source.feature_dtype) if normals else None
        # logits and input_gradient from features, for the first so many samples
        self.mlp_forward = prepared_forward(
            self.features, *source.plain, "relu", source.precision, self.logits, self.input_gradient
        )

    def rows(self, channels: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised `[size, channels]`."""
        if self._planes:
            return self._like.new_empty(channels, self._size, dtype=dtype).t()
        return self._like.new_empty(self._size, channels, dtype=dtype)
