"""The default field: a multiresolution hash grid and one small MLP for density and albedo."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamfusion_fast.fields.base import (
    SHORTEST_LOGIT_GRADIENT,
    Backend,
    Field,
    FieldOutput,
    check_backend,
    check_positions,
    normal_from,
)
from dreamfusion_fast.ops.hash_grid import hash_grid, hash_grid_layout, hash_grid_reference

# exp(15) = 3.3e6 per scene unit: opaque within any step; more only risks overflow.
_MAX_EXPONENT = 15.0
# Squared distance added under the root of the softplus blob so that its second derivatives stay finite at the centre.
_BLOB_CENTRE_EPS = 1e-10


class _TruncatedExp(torch.autograd.Function):
    """exp(min(x, 15)) whose gradient does not vanish above 15, so that a runaway density can come back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clamp(max=_MAX_EXPONENT).exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * y


def truncated_exp(x: Tensor) -> Tensor:
    """exp(x), saturated at x = 15 with the gradient of the saturation point above it. Any shape."""
    return _TruncatedExp.apply(x)


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
    mlp_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the MLP's matrix products (autocast); parameters stay float32."""
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
        if self.mlp_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(
                f"HashGridFieldConfig.mlp_dtype: got {self.mlp_dtype!r}, want float32, bfloat16 or float16"
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
        self._hash_grid = hash_grid if c.backend == "native" else hash_grid_reference
        self._blob_scale = (
            c.blob_scale if c.blob_scale is not None else {"exp": 5.0, "softplus": 10.0}[c.density_activation]
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
        density's own gradient (both activations increase) and safe where the density under- or overflows. They are
        analytic, and differentiable to all parameters when gradients are enabled.

        Args:
            positions: `[m, 3]`, scene units.
            with_normal: whether to compute normals.

        Returns:
            density `[m]` (0 outside the bound), albedo `[m, 3]` in (0, 1), normal `[m, 3]` or None.
        """
        check_positions(positions)
        if not with_normal:
            logits, inside = self._logits(positions, outputs=4)
            return FieldOutput(self._activate(logits[:, 0], inside), torch.sigmoid(logits[:, 1:]))
        keep_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            points = positions if positions.requires_grad else positions.detach().requires_grad_(True)
            logits, inside = self._logits(points, outputs=4)
            raw = logits[:, 0]
            normal = normal_from(raw, points, keep_graph, SHORTEST_LOGIT_GRADIENT)
        if not keep_graph:
            logits, normal = logits.detach(), normal.detach()
        return FieldOutput(self._activate(logits[:, 0], inside), torch.sigmoid(logits[:, 1:]), normal)

    def density(self, positions: Tensor) -> Tensor:
        """Density `[m]` at `positions` `[m, 3]`, without the albedo's share of the work."""
        check_positions(positions)
        logits, inside = self._logits(positions, outputs=1)
        return self._activate(logits[:, 0], inside)

    def _logits(self, positions: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
        """First `outputs` columns of (density logit with blob, albedo logits), and the inside mask."""
        low, high = self.aabb[:3], self.aabb[3:]
        unit = (positions - low) * (1.0 / (high - low))
        inside = self._inside(unit.detach())
        levels = self._active_levels
        table = self.table if levels == self.config.levels else self.table[: self._level_rows[levels]]
        features = self._hash_grid(
            unit.clamp(0.0, 1.0),
            table,
            self.level_offsets[: levels + 1],
            self.resolutions[:levels],
            self.config.smoothstep,
        )
        with self._autocast(features.device.type):
            hidden = features
            for index, layer in enumerate(self.layers):
                assert isinstance(layer, nn.Linear)
                weight, bias = layer.weight, layer.bias
                if index == 0 and features.shape[1] != weight.shape[1]:
                    weight = weight[:, : features.shape[1]]
                if index == len(self.layers) - 1:
                    hidden = F.linear(hidden, weight[:outputs], bias[:outputs])
                else:
                    hidden = torch.relu(F.linear(hidden, weight, bias))
        logits = hidden.to(positions.dtype)
        if self._blob_scale == 0.0:
            return logits, inside
        blob = self._blob(positions - 0.5 * (low + high))
        if outputs == 1:
            return logits + blob[:, None], inside
        return torch.cat([(logits[:, 0] + blob)[:, None], logits[:, 1:]], dim=1), inside

    def _inside(self, unit: Tensor) -> Tensor:
        centred = 2.0 * unit - 1.0
        if self.config.bound == "ball":
            return centred.square().sum(dim=1) <= 1.0
        return (centred.abs() <= 1.0).all(dim=1)

    def _blob(self, offsets: Tensor) -> Tensor:
        squared = offsets.square().sum(dim=1)
        if self.config.density_activation == "exp":
            return self._blob_scale * torch.exp(squared * (-0.5 / self.config.blob_std**2))
        return self._blob_scale * (1.0 - torch.sqrt(squared + _BLOB_CENTRE_EPS) * (1.0 / self.config.blob_radius))

    def _activate(self, raw: Tensor, inside: Tensor) -> Tensor:
        density = truncated_exp(raw) if self.config.density_activation == "exp" else F.softplus(raw)
        return torch.where(inside, density, torch.zeros_like(density))

    def _autocast(self, device_type: str) -> AbstractContextManager[Any]:
        if self.config.mlp_dtype == "float32":
            return nullcontext()
        return torch.autocast(device_type, dtype=getattr(torch, self.config.mlp_dtype))
