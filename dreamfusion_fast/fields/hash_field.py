"""The default field: a multiresolution hash grid and one small MLP for density and albedo."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamfusion_fast.fields.base import (
    Backend,
    Field,
    FieldOutput,
    check_positions,
)
from dreamfusion_fast.fields.layers import linear_layers
from dreamfusion_fast.fields.revision import HostBox
from dreamfusion_fast.fields.tile_source import TileSource
from dreamfusion_fast.ops._checks import FLOATS
from dreamfusion_fast.ops.hash_grid import (
    hash_grid,
    hash_grid_layout,
    hash_grid_position_gradient,
    hash_grid_position_gradient_reference,
    hash_grid_reference,
)
from dreamfusion_fast.ops.sample_head import DensityHead, SampleHead, safe_normalize
from dreamfusion_fast.ops.tiles.hash_grid import HashGridTileLayout
from dreamfusion_fast.settings import Range, Settings


@dataclass(frozen=True)
class HashGridFieldConfig(Settings):
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
    hidden: Annotated[int, Range(1, 4096)] = 64
    """Width of the MLP."""
    hidden_layers: Annotated[int, Range(1, 64)] = 1
    """Hidden layers of the MLP."""
    density_activation: Literal["softplus", "exp"] = "softplus"
    """exp with the blob of DreamFusion (appendix A.2), or softplus with the blob of Magic3D (section 3)."""
    blob_scale: Annotated[float | None, Range(-1e6, 1e6)] = None
    """Height of the initial density blob; None: 5 with exp, 10 with softplus; 0: no blob."""
    blob_std: Annotated[float, Range(0, open="low")] = 0.2
    """Standard deviation of the exp blob, in scene units."""
    blob_radius: Annotated[float, Range(0, open="low")] = 0.5
    """Radius at which the softplus blob crosses zero, in scene units."""
    density_bias: Annotated[float, Range(-1e6, 1e6)] = 0.0
    """Initial bias of the density's logit: a scene starts thin with a negative one, no blob and the box as bound."""
    bound: Literal["ball", "box"] = "ball"
    """Where density may be: the ball (ellipsoid) inscribed in the scene box, or the whole box."""
    channels: Annotated[int, Range(0, 12)] = 0
    """Outputs of the MLP beside density and albedo, composited as they are: the channel `features` of a render."""
    mlp_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type of the operands of the MLP's products, and with float16, of what is read of the table; sums and parameters
    stay float32. auto: float16 on a GPU, float32 elsewhere."""
    backend: Backend = "native"
    """Hash grid by the native core or by its pure-PyTorch twin."""

    def check_together(self) -> None:
        if self.finest_resolution < self.base_resolution:
            self.refuse("finest_resolution", want=f"at least base_resolution = {self.base_resolution}")

    def build(
        self, aabb: Tensor | tuple[float, ...] | None = None, generator: torch.Generator | None = None
    ) -> HashGridField:
        """The field; arguments as of :class:`HashGridField`."""
        return HashGridField(self, aabb, generator)


class HashGridField(Field):
    """Density and albedo from a hash grid (Mueller et al. 2022) and one MLP, with a density blob at the box's centre.

    Example:
        >>> import torch
        >>> from dreamfusion_fast.fields import HashGridField, HashGridFieldConfig
        >>> field = HashGridField(HashGridFieldConfig(levels=4, log2_rows=12, finest_resolution=64))
        >>> output = field(torch.rand(5, 3) - 0.5, with_normal=True)
        >>> output.density.shape, output.color.shape, output.normal.shape
        (torch.Size([5]), torch.Size([5, 3]), torch.Size([5, 3]))
    """

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
        self._box = HostBox()
        self.table = nn.Parameter(
            torch.empty(int(level_offsets[-1]), c.features).uniform_(-1e-4, 1e-4, generator=generator)
        )
        widths = [c.levels * c.features] + [c.hidden] * c.hidden_layers + [4 + c.channels]
        self.layers = linear_layers(widths, generator)
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            last.bias[0] = c.density_bias
        native = c.backend == "native"
        self._hash_grid = hash_grid if native else hash_grid_reference
        self._position_gradient = hash_grid_position_gradient if native else hash_grid_position_gradient_reference
        exponential = c.density_activation == "exp"
        self._density_head = DensityHead(
            activation=c.density_activation,
            blob_scale=c.blob_scale if c.blob_scale is not None else 5.0 if exponential else 10.0,
            blob_width=c.blob_std if exponential else c.blob_radius,
            ball=c.bound == "ball",
        )

    def forward(self, positions: Tensor, with_normal: bool = False) -> FieldOutput:
        """Density, albedo and normals.

        Normals are -grad / |grad| of the density before its activation, blob included: the same direction as the
        density's own gradient (both activations increase) and safe where the density under- or overflows. The gradient
        is derived by hand, J_grid^T W1^T D1 W2^T ... w with D the ReLUs' masks, and differentiable to all parameters.

        Args:
            positions: `[m, 3]`, scene units.
            with_normal: whether to compute normals.

        Returns:
            density `[m]` (0 outside the bound), colour `[m, 3]` in (0, 1), normal `[m, 3]` or None; the channel
            `features` `[m, config.channels]`, if there are any.
        """
        raw = self.logits(positions, with_normal)
        return replace(raw, color=torch.sigmoid(raw.color))

    def logits(self, positions: Tensor, with_normal: bool = False) -> FieldOutput:
        """As :meth:`forward`, but with the albedo before its sigmoid: any number, `[m, 3]`."""
        self._check(positions)
        unit, grid = self._unit(positions), self._grid()
        logits, hidden = self._network(self._hash_grid(unit, *grid), outputs=4 + self.config.channels)
        offsets = self._offsets(positions)
        density = self._density_head.density(logits[:, 0], offsets, unit)
        albedo = logits[:, 1:4]
        channels = {name: logits[:, 4:] for name in self._channels}
        if not with_normal:
            return FieldOutput(density, albedo, channels=channels)
        gradient = self._position_gradient(self._feature_gradient(hidden), unit, *grid)
        gradient = gradient * self._scale() + self._density_head.blob_gradient(offsets)
        return FieldOutput(density, albedo, -safe_normalize(gradient), channels=channels)

    def density(self, positions: Tensor) -> Tensor:
        """Density `[m]` at `positions` `[m, 3]`, without the albedo's share of the work."""
        self._check(positions)
        unit = self._unit(positions)
        logits, _ = self._network(self._hash_grid(unit, *self._grid()), outputs=1)
        return self._density_head.density(logits[:, 0], self._offsets(positions), unit)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HashGridField:
        """Refuse 16 bits, for which no op has code, in `.to`, `.half` and the like."""
        dtype = fn(self.table.new_empty(0)).dtype
        if dtype not in FLOATS:
            raise TypeError(
                f"HashGridField: got {dtype} for its parameters, want {' or '.join(map(str, FLOATS))}; "
                "HashGridFieldConfig.mlp_dtype is the setting for half precision"
            )
        return super()._apply(fn, recurse)

    def _check(self, positions: Tensor) -> None:
        check_positions(positions)
        if positions.dtype != self.table.dtype:
            raise TypeError(f"positions: got {positions.dtype}, want {self.table.dtype}, the field's")

    def _offsets(self, positions: Tensor) -> Tensor:
        """From the centre of the scene box, scene units."""
        return positions - 0.5 * (self.aabb[:3] + self.aabb[3:])

    def _scale(self) -> Tensor:
        return 1.0 / (self.aabb[3:] - self.aabb[:3])

    def _unit(self, positions: Tensor) -> Tensor:
        """Scene box to [0, 1]^3; the hash grid clamps what lies outside."""
        return (positions - self.aabb[:3]) * self._scale()

    def _grid(self) -> tuple[Tensor, Tensor, Tensor, bool]:
        """The arguments of the hash grid's ops behind the positions."""
        return self.table, self.level_offsets, self.resolutions, self.config.smoothstep

    def _layers(self) -> list[tuple[Tensor, Tensor]]:
        """Weight `[out, in]` and bias `[out]` of each layer."""
        return [(layer.weight, layer.bias) for layer in self.layers if isinstance(layer, nn.Linear)]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The table, and the MLP's parameters."""
        return {"table": [self.table], "mlp": list(self.layers.parameters())}

    def tile_source(self) -> TileSource | None:
        """Table, MLP and what becomes of its outputs; None with the reference backend."""
        if self.config.backend != "native":
            return None
        if self._layout is None or self._layout.level_offsets is not self.level_offsets:
            self._layout = HashGridTileLayout(self.level_offsets, self.resolutions, self.config.smoothstep)
        # float64 has no 16-bit mode, and a CPU none that would be faster.
        narrow = self.table.dtype == torch.float32 and self.table.is_cuda
        weights, biases = zip(*self._layers(), strict=True)
        return TileSource(
            self.table,
            self._layout,
            list(weights),
            list(biases),
            self._head(),
            self.precision if narrow else "float32",
            self._box.read(self.aabb),
            self._channels,
        )

    @property
    def _channels(self) -> dict[str, int]:
        return {"features": self.config.channels} if self.config.channels else {}

    def _head(self) -> SampleHead:
        """How density and normals come from the MLP's outputs."""
        box = self._box.read(self.aabb)
        low, high = box[:3], box[3:]
        return SampleHead(
            centre=tuple(0.5 * (a + b) for a, b in zip(low, high, strict=True)),  # type: ignore[arg-type]
            extent=tuple(b - a for a, b in zip(low, high, strict=True)),  # type: ignore[arg-type]
            **vars(self._density_head),
        )

    def _network(self, features: Tensor, outputs: int) -> tuple[Tensor, list[Tensor]]:
        """The first `outputs` of (density logit, albedo logits, channels), `[m, outputs]`, and the MLP's hidden
        activations."""
        *inner, (weight, bias) = self._layers()
        hidden: list[Tensor] = []
        with self._autocast(features.device.type):
            x = features
            for inner_weight, inner_bias in inner:
                x = torch.relu(F.linear(x, inner_weight, inner_bias))
                hidden.append(x)
            logits = F.linear(x, weight[:outputs], bias[:outputs])
        return logits.to(features.dtype), hidden

    def _feature_gradient(self, hidden: list[Tensor]) -> Tensor:
        """Gradient of the density logit by the hash grid's features, `[m, levels * features]`.

        ReLU has no second derivative, so its masks are constants, and autograd does the rest for the weights.
        """
        *inner, (last_weight, _), (weight, _) = self._layers()
        # Of what passed a ReLU, the sign is its mask, as numbers in the type that the products below want.
        *masks, last_mask = (activation.detach().sign() for activation in hidden)
        with self._autocast(last_mask.device.type):
            # The output's row is the same for all samples: it goes into the matrix, not into each sample's mask.
            gradient = last_mask @ (weight[:1].T * last_weight)
            for (inner_weight, _), mask in zip(reversed(inner), reversed(masks), strict=True):
                gradient = (gradient * mask) @ inner_weight
        return gradient.to(self.table.dtype)

    @property
    def precision(self) -> str:
        """`HashGridFieldConfig.mlp_dtype`, with auto decided by the device."""
        if self.config.mlp_dtype != "auto":
            return self.config.mlp_dtype
        return "float16" if self.table.is_cuda else "float32"

    def _autocast(self, device_type: str) -> AbstractContextManager[Any]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(device_type, dtype=getattr(torch, self.precision))
