"""What the streaming renderer works on: the built-in field as kernels read it, and the buffers of one tile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dreamfusion_fast.fields.hash_field import HashGridField
from dreamfusion_fast.gpu.memory import free_bytes
from dreamfusion_fast.ops.tiles.hash_grid import HashGridTileLayout
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


def trainable_parts(source: HashGridField) -> list[Tensor]:
    """Of the active levels: the table, then weights, then biases of the MLP."""
    layers = source.active_layers()
    return [source.grid()[0], *(weight for weight, _ in layers), *(bias for _, bias in layers)]


@dataclass(frozen=True, eq=False)
class StreamingField:
    """The built-in field as the kernels read it.

    Attributes:
        table: `[n_rows, features]`, the active levels' rows.
        layout: of the levels.
        parameters: weights and then biases of the MLP, the first layer's columns those of the active levels.
        weights, biases: the same without their graph, contiguous.
        precision: "float32", "float16" or "bfloat16", of the MLP's operands; with float16 also of table reads.
        box: six numbers, the scene box.
    """

    table: Tensor
    layout: HashGridTileLayout
    parameters: list[Tensor]
    weights: list[Tensor]
    biases: list[Tensor]
    precision: str
    box: tuple[float, ...]

    @classmethod
    def of(cls, source: HashGridField) -> StreamingField:
        """The active part of a field."""
        table, *parameters = trainable_parts(source)
        # float64 has no 16-bit mode, and a CPU none that would be faster.
        wide = table.dtype != torch.float32 or table.device.type != "cuda"
        precision = "float32" if wide else source.precision
        plain = [parameter.detach().contiguous() for parameter in parameters]
        n = len(parameters) // 2
        return cls(table, source.tile_layout(), parameters, plain[:n], plain[n:], precision, source.box)

    @property
    def n_features(self) -> int:
        return self.weights[0].shape[1]

    @property
    def feature_dtype(self) -> torch.dtype:
        """Of the encoding and of the input gradient: the operands' own."""
        return self.table.dtype if self.precision == "float32" else getattr(torch, self.precision)

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Of gradients by the encoding: a float16 underflows at the size that score distillation gradients have."""
        return self.table.dtype if self.precision == "float32" else torch.bfloat16

    def readable_table(self) -> Tensor:
        """The table in the type that the kernels read."""
        return self.table.detach().to(torch.float16 if self.precision == "float16" else self.table.dtype)

    def bytes_per_sample(self, normals: bool, backward: bool) -> int:
        """Of a tile's workspace."""
        real = self.table.element_size()
        wide = self.n_features * self.feature_dtype.itemsize
        narrow = self.n_features * self.gradient_dtype.itemsize
        size = (4 + 4) * real + wide + normals * (3 * real + wide)
        return size + backward * (4 * real + narrow + normals * (3 * real + narrow))


class Workspace:
    """Buffers of one tile; on a GPU a plane per channel, on a CPU a row per sample."""

    def __init__(self, size: int, source: StreamingField, normals: bool, lengths: bool) -> None:
        self._planes = source.table.device.type == "cuda"
        self._like = source.table.detach()
        self._size = size
        n = source.n_features
        self.t = self._like.new_empty(size)
        self.lengths = self._like.new_empty(size) if lengths else None
        self.positions = self.rows(3)
        self.features = self.rows(n, source.feature_dtype)
        self.logits = self.rows(4)
        self.slopes = self.rows(3) if normals else None
        self.input_gradient = self.rows(n, source.feature_dtype) if normals else None
        # logits and input_gradient from features, for the first so many samples
        self.mlp_forward = prepared_forward(
            self.features, source.weights, source.biases, "relu", source.precision, self.logits, self.input_gradient
        )

    def rows(self, channels: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised `[size, channels]`."""
        if self._planes:
            return self._like.new_empty(channels, self._size, dtype=dtype).t()
        return self._like.new_empty(self._size, channels, dtype=dtype)
