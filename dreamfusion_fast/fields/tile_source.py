"""A field as the kernels of the streaming renderer read it, tile by tile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from dreamfusion_fast.ops.sample_head import SampleHead


class TileEncoding(Protocol):
    """An encoding over tiles: the functions of `ops.tiles.hash_grid` and of `ops.tiles.triplane`, which say more."""

    def encode(
        self, positions: Tensor, table: Tensor, layout: Any, features: Tensor, count: Tensor | None, checked: bool, /
    ) -> None: ...

    def position_gradient(
        self,
        grad_features: Tensor,
        positions: Tensor,
        table: Tensor,
        layout: Any,
        gradient: Tensor,
        count: Tensor | None,
        checked: bool,
        /,
    ) -> None: ...

    def directional_derivative(
        self,
        direction: Tensor,
        positions: Tensor,
        table: Tensor,
        layout: Any,
        derivative: Tensor,
        count: Tensor | None,
        checked: bool,
        /,
    ) -> None: ...

    def derivative_before_scatter(
        self,
        direction: Tensor,
        grad_of_features: Tensor,
        grad_table: Tensor,
        positions: Tensor,
        table: Tensor,
        layout: Any,
        derivative: Tensor,
        count: Tensor | None,
        checked: bool,
        /,
    ) -> tuple[Tensor | None, Tensor | None]: ...

    def scatter(
        self,
        grad_table: Tensor,
        positions: Tensor,
        layout: Any,
        grad_features: Tensor,
        count: Tensor | None,
        direction: Tensor | None,
        grad_of_features: Tensor | None,
        checked: bool,
        /,
    ) -> None: ...


@dataclass(frozen=True, eq=False)
class TileSource:
    """A hash grid or a triplane, one MLP on its features, and what becomes of the MLP's outputs.

    Attributes:
        encoding: the functions that read `table` as `layout` says.
        table: what they read, float32 or float64: `[n_rows, features]` of a hash grid, the planes of a triplane.
        layout: of the table.
        weights: `[out, in]` of each layer of the MLP, with ReLU in between; the last one has four rows, and those
            of the channels.
        biases: `[out]` of each layer.
        head: how density, albedo and normal come from the outputs.
        precision: of the MLP's operands: "float32" for the table's own type, or "float16" or "bfloat16" on a GPU with a
            float32 table. With float16 the table is read so, too.
        box: six numbers, the scene box.
        channels: names and widths of the outputs behind density and albedo, which are composited as they are.
        scene: name of the extra that says of which scene a ray is, integers `[n_rays]`; None: there is one scene. Of
            several, `layout` has a member `scenes`.
    """

    encoding: TileEncoding
    table: Tensor
    layout: Any
    weights: list[Tensor]
    biases: list[Tensor]
    head: SampleHead
    precision: str
    box: tuple[float, ...]
    channels: Mapping[str, int] = field(default_factory=dict)
    scene: str | None = None

    @property
    def parameters(self) -> list[Tensor]:
        """All that gradients are for: the table, then weights, then biases."""
        return [self.table, *self.weights, *self.biases]

    @cached_property
    def plain(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and biases without their graph, contiguous."""
        weights = [weight.detach().contiguous() for weight in self.weights]
        return weights, [bias.detach().contiguous() for bias in self.biases]

    @property
    def n_features(self) -> int:
        """Of the encoding."""
        return self.weights[0].shape[1]

    @property
    def n_outputs(self) -> int:
        """Of the MLP."""
        return self.weights[-1].shape[0]

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
        logits = self.n_outputs * real
        size = 4 * real + logits + wide + normals * (3 * real + wide)
        return size + backward * (logits + narrow + normals * (3 * real + narrow))
