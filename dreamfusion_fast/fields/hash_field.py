"""The default field: a multiresolution hash grid and one small MLP for density and albedo."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from types import FunctionType
from typing import Any, Literal, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamfusion_fast.fields.base import (
    Backend,
    Field,
    FieldLike,
    FieldOutput,
    check_backend,
    check_positions,
    differentiable,
    is_as_declared,
)
from dreamfusion_fast.fields.host_box import HostBox
from dreamfusion_fast.ops._checks import FLOATS
from dreamfusion_fast.ops.hash_grid import hash_grid, hash_grid_layout, hash_grid_position_gradient, hash_grid_reference
from dreamfusion_fast.ops.sample_head import DensityHead, SampleHead, safe_normalize
from dreamfusion_fast.ops.tiles.hash_grid import HashGridTileLayout


def _position_gradient_reference(grad_output: Tensor, positions: Tensor, *grid: Any) -> Tensor:
    """`hash_grid_position_gradient` by autograd through the twin, for any dtype and device."""
    keep_graph = torch.is_grad_enabled()
    with differentiable(positions) as points:
        features = hash_grid_reference(points, *grid)
        (gradient,) = torch.autograd.grad(features, points, grad_output, create_graph=keep_graph)
    return gradient


@dataclass(frozen=True)
class HashGridFieldConfig:
    """Settings of :class:`HashGridField`; the defaults are those of stable-dreamfusion and Magic3D."""

    levels: int = 16
    """Resolution levels of the grid."""
    features: int = 2
    """Features per table row and level: 1, 2, 4 or 8."""
    log2_rows: int = 19
    """Base-2 logarithm of the most table rows a level may have."""
    base_resolution: int = 16
    """Cells per side of the coarsest level."""
    finest_resolution: int = 2048
    """Cells per side of the finest level."""
    smoothstep: bool = False
    """Interpolate with smoothstep weights: continuous normals, slightly blurrier."""
    hidden: int = 64
    """Width of the MLP."""
    hidden_layers: int = 1
    """Hidden layers of the MLP."""
    density_activation: Literal["softplus", "exp"] = "softplus"
    """exp with the blob of DreamFusion (appendix A.2), or softplus with the blob of Magic3D (section 3)."""
    blob_scale: float | None = None
    """Height of the initial density blob; None: 5 with exp, 10 with softplus; 0: no blob."""
    blob_std: float = 0.2
    """Standard deviation of the exp blob, in scene units."""
    blob_radius: float = 0.5
    """Radius at which the softplus blob crosses zero, in scene units."""
    bound: Literal["ball", "box"] = "ball"
    """Where density may be: the ball (ellipsoid) inscribed in the scene box, or the whole box."""
    mlp_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type of the operands of the MLP's products, and with float16, of what is read of the table; sums and parameters
    stay float32. auto: float16 on a GPU, float32 elsewhere."""
    backend: Backend = "native"
    """Hash grid by the native core or by its pure-PyTorch twin."""

    def __post_init__(self) -> None:
        for name in ("levels", "features", "log2_rows", "base_resolution", "hidden", "hidden_layers"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"HashGridFieldConfig.{name}: got {value}, want at least 1")
        if self.finest_resolution < self.base_resolution:
            raise ValueError(
                f"HashGridFieldConfig.finest_resolution: got {self.finest_resolution}, want at least base_resolution = "
                f"{self.base_resolution}"
            )
        if self.density_activation not in ("softplus", "exp"):
            raise ValueError(
                f"HashGridFieldConfig.density_activation: got {self.density_activation!r}, want softplus or exp"
            )
        if self.bound not in ("ball", "box"):
            raise ValueError(f"HashGridFieldConfig.bound: got {self.bound!r}, want ball or box")
        if self.mlp_dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(
                f"HashGridFieldConfig.mlp_dtype: got {self.mlp_dtype!r}, want auto, float32, bfloat16 or float16"
            )
        if self.blob_std <= 0 or self.blob_radius <= 0:
            raise ValueError(
                f"HashGridFieldConfig.blob_std, blob_radius: got {self.blob_std}, {self.blob_radius}, want both above 0"
            )
        check_backend(self.backend)


class HashGridField(Field):
    """Density and albedo from a hash grid (Mueller et al. 2022) and one MLP, with a density blob at the box's centre.

    Example:
        >>> import torch
        >>> from dreamfusion_fast.fields import HashGridField, HashGridFieldConfig
        >>> field = HashGridField(HashGridFieldConfig(levels=4, log2_rows=12, finest_resolution=64))
        >>> output = field(torch.rand(5, 3) - 0.5, with_normal=True)
        >>> output.density.shape, output.albedo.shape, output.normal.shape
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
        self._level_rows: list[int] = level_offsets.tolist()
        self._active_levels = c.levels
        self._layout: tuple[tuple[int, int], HashGridTileLayout] | None = None
        self._box = HostBox()
        self.table = nn.Parameter(
            torch.empty(self._level_rows[-1], c.features).uniform_(-1e-4, 1e-4, generator=generator)
        )
        widths = [c.levels * c.features] + [c.hidden] * c.hidden_layers + [4]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        with torch.no_grad():
            for layer in self.layers:
                assert isinstance(layer, nn.Linear)
                bound = 1.0 / math.sqrt(layer.in_features)
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.zero_()
        native = c.backend == "native"
        self._hash_grid = hash_grid if native else hash_grid_reference
        self._position_gradient = hash_grid_position_gradient if native else _position_gradient_reference
        exponential = c.density_activation == "exp"
        self._density_head = DensityHead(
            activation=c.density_activation,
            blob_scale=c.blob_scale if c.blob_scale is not None else 5.0 if exponential else 10.0,
            blob_width=c.blob_std if exponential else c.blob_radius,
            ball=c.bound == "ball",
        )

    @property
    def active_levels(self) -> int:
        """How many levels, from the coarsest, are read."""
        return self._active_levels

    def set_active_levels(self, count: int) -> None:
        """Read only the `count` coarsest levels (coarse to fine training); the finer ones count as zero.

        Inactive levels cost nothing and receive no gradient. Raises ValueError unless 1 <= count <= levels.
        """
        if not 1 <= count <= self.config.levels:
            raise ValueError(f"count: got {count}, want 1 to {self.config.levels} levels")
        self._active_levels = count

    def forward(self, positions: Tensor, with_normal: bool = False) -> FieldOutput:
        """Density, albedo and normals.

        Normals are -grad / |grad| of the density before its activation, blob included: the same direction as the
        density's own gradient (both activations increase) and safe where the density under- or overflows. The gradient
        is derived by hand, J_grid^T W1^T D1 W2^T ... w with D the ReLUs' masks, and differentiable to all parameters.

        Args:
            positions: `[m, 3]`, scene units.
            with_normal: whether to compute normals.

        Returns:
            density `[m]` (0 outside the bound), albedo `[m, 3]` in (0, 1), normal `[m, 3]` or None.
        """
        check_positions(positions)
        unit, grid = self._unit(positions), self.grid()
        logits, hidden = self._network(self._hash_grid(unit, *grid), outputs=4)
        offsets = positions - 0.5 * (self.aabb[:3] + self.aabb[3:])
        density = self._activate(logits[:, 0], offsets, unit)
        albedo = torch.sigmoid(logits[:, 1:])
        if not with_normal:
            return FieldOutput(density, albedo)
        gradient = self._position_gradient(self._feature_gradient(hidden), unit, *grid)
        gradient = gradient * self._scale() + self._density_head.blob_gradient(offsets)
        return FieldOutput(density, albedo, -safe_normalize(gradient))

    def density(self, positions: Tensor) -> Tensor:
        """Density `[m]` at `positions` `[m, 3]`, without the albedo's share of the work."""
        check_positions(positions)
        unit = self._unit(positions)
        logits, _ = self._network(self._hash_grid(unit, *self.grid()), outputs=1)
        return self._activate(logits[:, 0], positions - 0.5 * (self.aabb[:3] + self.aabb[3:]), unit)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HashGridField:
        """What `.to`, `.half` and the like do to a module's tensors; here not to 16 bits, for which no op has code."""
        dtype = fn(self.table.new_empty(0)).dtype
        if dtype not in FLOATS:
            raise TypeError(
                f"HashGridField: got {dtype} for its parameters, want {' or '.join(map(str, FLOATS))}; "
                "HashGridFieldConfig.mlp_dtype is the setting for half precision"
            )
        return super()._apply(fn, recurse)

    def _scale(self) -> Tensor:
        return 1.0 / (self.aabb[3:] - self.aabb[:3])

    def _unit(self, positions: Tensor) -> Tensor:
        """Scene box to [0, 1]^3; the hash grid clamps what lies outside."""
        return (positions - self.aabb[:3]) * self._scale()

    def grid(self) -> tuple[Tensor, Tensor, Tensor, bool]:
        """The active part of the hash grid: table `[n_rows, features]`, level_offsets, resolutions, smoothstep."""
        levels = self._active_levels
        table = self.table if levels == self.config.levels else self.table[: self._level_rows[levels]]
        return table, self.level_offsets[: levels + 1], self.resolutions[:levels], self.config.smoothstep

    def tile_layout(self) -> HashGridTileLayout:
        """The active levels as the streaming renderer's kernels read them; the same object until something changes."""
        state = (self._active_levels, self.level_offsets.data_ptr())
        if self._layout is None or self._layout[0] != state:
            _, level_offsets, resolutions, smoothstep = self.grid()
            self._layout = (state, HashGridTileLayout(level_offsets, resolutions, smoothstep))
        return self._layout[1]

    def active_layers(self) -> list[tuple[Tensor, Tensor]]:
        """Weight `[out, in]` and bias `[out]` of each layer, the first one's without the columns of inactive levels."""
        layers: list[tuple[Tensor, Tensor]]
        layers = [(layer.weight, layer.bias) for layer in self.layers if isinstance(layer, nn.Linear)]
        if self._active_levels < self.config.levels:
            layers[0] = (layers[0][0][:, : self._active_levels * self.config.features], layers[0][1])
        return layers

    @property
    def box(self) -> tuple[float, ...]:
        """The scene box on the host, six numbers; a GPU is waited for only when it was changed."""
        return self._box.read(self.aabb)

    def head(self) -> SampleHead:
        """How density and normals come from the MLP's outputs."""
        low, high = self.box[:3], self.box[3:]
        return SampleHead(
            centre=tuple(0.5 * (a + b) for a, b in zip(low, high, strict=True)),  # type: ignore[arg-type]
            extent=tuple(b - a for a, b in zip(low, high, strict=True)),  # type: ignore[arg-type]
            **vars(self._density_head),
        )

    def _network(self, features: Tensor, outputs: int) -> tuple[Tensor, list[Tensor]]:
        """The first `outputs` of (density logit, albedo logits), `[m, outputs]`, and the MLP's hidden activations."""
        *inner, (weight, bias) = self.active_layers()
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
        *inner, (last_weight, _), (weight, _) = self.active_layers()
        # Of what passed a ReLU, the sign is its mask, as numbers in the type that the products below want.
        *masks, last_mask = (activation.detach().sign() for activation in hidden)
        with self._autocast(last_mask.device.type):
            # The output's row is the same for all samples: it goes into the matrix, not into each sample's mask.
            gradient = last_mask @ (weight[:1].T * last_weight)
            for (inner_weight, _), mask in zip(reversed(inner), reversed(masks), strict=True):
                gradient = (gradient * mask) @ inner_weight
        return gradient.to(self.table.dtype)

    def _activate(self, logit: Tensor, offsets: Tensor, unit: Tensor) -> Tensor:
        """Density from its logit without the blob; zero outside the bound."""
        return self._density_head.density(logit, offsets, unit)

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


_OWN = {
    name: value
    for name, value in vars(HashGridField).items()
    if isinstance(value, FunctionType | property) and name != "__init__"
}


def is_built_in(field: FieldLike) -> TypeGuard[HashGridField]:
    """Whether kernels that do what :class:`HashGridField` does may stand in for a call of `field`.

    They may for a subclass, too, as long as neither it nor the instance overrides a method or property other than
    `__init__`, and no hooks are registered.
    """
    return (
        isinstance(field, HashGridField)
        and all(getattr(type(field), name) is value for name, value in _OWN.items())
        and type(field).__call__ is nn.Module.__call__
        and is_as_declared(field, _OWN.keys())
    )
