"""The default field: a multiresolution hash grid and one small MLP for density and albedo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from dreamfusion_fast.fields.encoded import EncodedField, EncodedFieldConfig
from dreamfusion_fast.fields.tile_source import TileSource
from dreamfusion_fast.ops.hash_grid import (
    hash_grid,
    hash_grid_layout,
    hash_grid_position_gradient,
    hash_grid_position_gradient_reference,
    hash_grid_reference,
)
from dreamfusion_fast.ops.tiles import hash_grid as hash_grid_tile
from dreamfusion_fast.ops.tiles.hash_grid import HashGridTileLayout
from dreamfusion_fast.settings import Range


@dataclass(frozen=True)
class HashGridFieldConfig(EncodedFieldConfig):
    """Settings of :class:`HashGridField`; the defaults are those of stable-dreamfusion and Magic3D."""

    kind: Literal["hash_grid"] = "hash_grid"
    """Tells the configs of fields apart."""
    levels: Annotated[int, Range(1, 64)] = 16
    """Resolution levels of the grid."""
    features: Literal[1, 2, 4, 8] = 2
    """Features per table row and level: 1, 2, 4 or 8."""
    log2_rows: Annotated[int, Range(1, 30)] = 19
    """Base-2 logarithm of the most table rows a level may have."""
    base_resolution: Annotated[int, Range(1, 2**20)] = 16
    """Cells per side of the coarsest level."""
    finest_resolution: Annotated[int, Range(1, 2**20)] = 2048
    """Cells per side of the finest level."""
    smoothstep: bool = False
    """Interpolate with smoothstep weights: continuous normals, slightly blurrier."""

    def check_together(self) -> None:
        if self.finest_resolution < self.base_resolution:
            self.refuse("finest_resolution", want=f"at least base_resolution = {self.base_resolution}")

    def build(
        self, aabb: Tensor | tuple[float, ...] | None = None, generator: torch.Generator | None = None
    ) -> HashGridField:
        """The field; arguments as of :class:`HashGridField`."""
        return HashGridField(self, aabb, generator)


class HashGridField(EncodedField):
    """Density and albedo from a hash grid (Mueller et al. 2022) and one MLP, with a density blob at the box's centre.

    Example:
        >>> import torch
        >>> from dreamfusion_fast.fields import HashGridField, HashGridFieldConfig
        >>> field = HashGridField(HashGridFieldConfig(levels=4, log2_rows=12, finest_resolution=64))
        >>> output = field(torch.rand(5, 3) - 0.5, with_normal=True)
        >>> output.density.shape, output.color.shape, output.normal.shape
        (torch.Size([5]), torch.Size([5, 3]), torch.Size([5, 3]))
    """

    config: HashGridFieldConfig
    level_offsets: Tensor
    resolutions: Tensor

    def __init__(
        self,
        config: HashGridFieldConfig | None = None,
        aabb: Tensor | tuple[float, ...] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Initialise from `generator` (torch's global one if None): table U(-1e-4, 1e-4), layers U(+-1/sqrt(fan in)).

        Args:
            config: settings.
            aabb: scene box `[6]`; [-1, 1]^3 if None.
            generator: a CPU generator that makes the initial parameters reproducible.
        """
        super().__init__(aabb)
        self.config = config or HashGridFieldConfig()
        c = self.config
        level_offsets, resolutions = hash_grid_layout(c.levels, c.base_resolution, c.finest_resolution, c.log2_rows)
        self.register_buffer("level_offsets", level_offsets, persistent=False)
        self.register_buffer("resolutions", resolutions, persistent=False)
        self._layout: HashGridTileLayout | None = None
        self.table = nn.Parameter(
            torch.empty(int(level_offsets[-1]), c.features).uniform_(-1e-4, 1e-4, generator=generator)
        )
        self._build_decoder(c.levels * c.features, generator)
        native = c.backend == "native"
        self._hash_grid = hash_grid if native else hash_grid_reference
        self._position_gradient = hash_grid_position_gradient if native else hash_grid_position_gradient_reference

    @property
    def _table(self) -> Tensor:
        return self.table

    def _features(self, unit: Tensor, scenes: Tensor | None) -> Tensor:
        return self._hash_grid(unit, *self._grid())

    def _slopes(self, grad_features: Tensor, unit: Tensor, scenes: Tensor | None) -> Tensor:
        return self._position_gradient(grad_features, unit, *self._grid())

    def _grid(self) -> tuple[Tensor, Tensor, Tensor, bool]:
        """The arguments of the hash grid's ops behind the positions."""
        return self.table, self.level_offsets, self.resolutions, self.config.smoothstep

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The table, and the MLP's parameters."""
        return {"table": [self.table], "mlp": list(self.layers.parameters())}

    def tile_source(self) -> TileSource | None:
        """Table, MLP and what becomes of its outputs; None with the reference backend."""
        if self.config.backend != "native":
            return None
        if self._layout is None or self._layout.level_offsets is not self.level_offsets:
            self._layout = HashGridTileLayout(self.level_offsets, self.resolutions, self.config.smoothstep)
        return TileSource(hash_grid_tile, self.table, self._layout, **self._decoder_source())
