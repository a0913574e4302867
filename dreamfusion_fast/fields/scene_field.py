"""A field for scenes: a box or all of space, and colours that depend on the viewing direction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamfusion_fast.fields.base import Backend, Field, FieldOutput, check_positions
from dreamfusion_fast.fields.contraction import contract
from dreamfusion_fast.fields.layers import linear_layers
from dreamfusion_fast.fields.samples import FieldSamples
from dreamfusion_fast.fields.spherical_harmonics import MOST_BANDS, spherical_harmonics
from dreamfusion_fast.ops._checks import FLOATS
from dreamfusion_fast.ops.hash_grid import differentiable, hash_grid, hash_grid_layout, hash_grid_reference
from dreamfusion_fast.ops.sample_head import safe_normalize, truncated_exp
from dreamfusion_fast.settings import Range, Settings


@dataclass(frozen=True)
class SceneFieldConfig(Settings):
    """Settings of :class:`SceneField`; the defaults are those of instant-ngp."""

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
    """Width of both MLPs."""
    hidden_layers: Annotated[int, Range(1, 64)] = 1
    """Hidden layers of the MLP for the density."""
    geometry_features: Annotated[int, Range(1, 4096)] = 15
    """Features that the density's MLP passes to the colour's."""
    color_layers: Annotated[int, Range(1, 64)] = 2
    """Hidden layers of the MLP for the colour."""
    view_degree: Annotated[int, Range(0, MOST_BANDS)] = 4
    """Bands of spherical harmonics of the viewing direction that the colour sees; 0: it does not depend on it."""
    density_activation: Literal["exp", "softplus"] = "exp"
    """Function from the density's logit to the density."""
    density_bias: Annotated[float, Range(-1e6, 1e6)] = -1.0
    """Initial bias of the density's logit. A scene starts with a density of exp of it per scene unit (softplus: of
    log(1 + exp)): the lower, the thinner."""
    contraction: Literal["none", "sphere"] = "none"
    """none: density lives in the box. sphere: in all of space, that beyond the ball (ellipsoid) inscribed in the box
    contracted (mip-NeRF 360)."""
    backend: Backend = "native"
    """Hash grid by the native core or by its pure-PyTorch twin."""

    def check_together(self) -> None:
        if self.finest_resolution < self.base_resolution:
            self.refuse("finest_resolution", want=f"at least base_resolution = {self.base_resolution}")

    def build(
        self, aabb: Tensor | tuple[float, ...] | None = None, generator: torch.Generator | None = None
    ) -> SceneField:
        """The field; arguments as of :class:`SceneField`."""
        return SceneField(self, aabb, generator)


class SceneField(Field):
    """Density and colour of a scene: a hash grid, an MLP for the density, and one for the colour (instant-ngp).

    There is no blob and no ball, as in :class:`HashGridField`: density may be anywhere in the box, or with
    `contraction="sphere"` in all of space. Then the box is where the grid is finest: what lies in the ball inscribed in
    it takes half of the grid's width, and a renderer goes beyond it with an occupancy grid of several cascades.

    With a `view_degree`, a call takes :class:`FieldSamples` in place of positions. The density takes positions always.

    Example:
        >>> import torch
        >>> from dreamfusion_fast.fields import SceneField, SceneFieldConfig
        >>> field = SceneField(SceneFieldConfig(levels=4, log2_rows=12, finest_resolution=64, view_degree=0))
        >>> output = field(torch.rand(5, 3) - 0.5, with_normal=True)
        >>> output.density.shape, output.color.shape, output.normal.shape
        (torch.Size([5]), torch.Size([5, 3]), torch.Size([5, 3]))
    """

    level_offsets: Tensor
    resolutions: Tensor

    def __init__(
        self,
        config: SceneFieldConfig | None = None,
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
        self.config = config or SceneFieldConfig()
        c = self.config
        if c.view_degree:
            self.needs = ("positions", "directions")
        level_offsets, resolutions = hash_grid_layout(c.levels, c.base_resolution, c.finest_resolution, c.log2_rows)
        self.register_buffer("level_offsets", level_offsets, persistent=False)
        self.register_buffer("resolutions", resolutions, persistent=False)
        self.table = nn.Parameter(
            torch.empty(int(level_offsets[-1]), c.features).uniform_(-1e-4, 1e-4, generator=generator)
        )
        geometry = [c.levels * c.features] + [c.hidden] * c.hidden_layers + [1 + c.geometry_features]
        self.density_layers = linear_layers(geometry, generator)
        last = self.density_layers[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            last.bias[0] = c.density_bias
        color = [c.geometry_features + c.view_degree**2] + [c.hidden] * c.color_layers + [3]
        self.color_layers = linear_layers(color, generator)
        self._hash_grid = hash_grid if c.backend == "native" else hash_grid_reference
        self._activation = truncated_exp if c.density_activation == "exp" else F.softplus

    def forward(self, samples: Any, with_normal: bool = False) -> FieldOutput:
        """Density, colour and, if asked for, normals.

        Normals are -grad / |grad| of the density's logit: the direction of the density's own gradient (both activations
        increase), and safe where the density under- or overflows. They are differentiable to all parameters.

        Args:
            samples: positions `[m, 3]`, scene units; with a `view_degree`, :class:`FieldSamples`.
            with_normal: whether to compute normals.

        Returns:
            density `[m]` (0 outside the box, unless space is contracted), colour `[m, 3]` in (0, 1), normal `[m, 3]` or
            None.
        """
        positions, directions = self._parts(samples)
        if not with_normal:
            logits, geometry = self._geometry(positions)
            return FieldOutput(self._density(logits, positions), self._color(geometry, directions))
        keep_graph = torch.is_grad_enabled()
        with differentiable(positions) as points:
            logits, geometry = self._geometry(points)
            (gradient,) = torch.autograd.grad(logits.sum(), points, create_graph=keep_graph, retain_graph=keep_graph)
        if not keep_graph:
            logits, geometry = logits.detach(), geometry.detach()
        density = self._density(logits, positions)
        return FieldOutput(density, self._color(geometry, directions), -safe_normalize(gradient))

    def density(self, positions: Tensor) -> Tensor:
        """Density `[m]` at `positions` `[m, 3]`, which no direction changes, without the colour's share of the work."""
        self._check(positions)
        return self._density(self._geometry(positions)[0], positions)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The table, and the MLPs' parameters."""
        return {"table": [self.table], "mlp": [*self.density_layers.parameters(), *self.color_layers.parameters()]}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SceneField:
        """Refuse 16 bits, for which no op has code, in `.to`, `.half` and the like."""
        dtype = fn(self.table.new_empty(0)).dtype
        if dtype not in FLOATS:
            raise TypeError(
                f"SceneField: got {dtype} for its parameters, want {' or '.join(map(str, FLOATS))}; torch.autocast "
                "runs its MLPs in half precision"
            )
        return super()._apply(fn, recurse)

    def _check(self, positions: Tensor) -> None:
        check_positions(positions)
        if positions.dtype != self.table.dtype:
            raise TypeError(f"positions: got {positions.dtype}, want {self.table.dtype}, the field's")

    def _parts(self, samples: Any) -> tuple[Tensor, Tensor | None]:
        """Positions, and directions if the colour depends on them."""
        if not self.config.view_degree:
            self._check(samples)
            return samples, None
        if not isinstance(samples, FieldSamples):
            raise TypeError(f"samples: got {type(samples).__name__}, want FieldSamples, or a field with view_degree 0")
        positions, directions = samples.positions, samples.directions
        self._check(positions)
        return positions, directions

    def _geometry(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Logit of the density `[m]`, and what the colour is told `[m, geometry_features]`."""
        centred = self._centred(positions)
        if self.config.contraction == "sphere":
            centred = 0.5 * contract(centred)  # a ball of radius 2 in a grid of width 2
        unit = 0.5 * (centred + 1.0)
        features = self._hash_grid(unit, self.table, self.level_offsets, self.resolutions, self.config.smoothstep)
        outputs = _network(self.density_layers, features).to(positions.dtype)
        return outputs[:, 0], outputs[:, 1:]

    def _centred(self, positions: Tensor) -> Tensor:
        """The scene box as [-1, 1]^3."""
        low, high = self.aabb[:3], self.aabb[3:]
        return (positions - 0.5 * (low + high)) * (2.0 / (high - low))

    def _density(self, logits: Tensor, positions: Tensor) -> Tensor:
        density = self._activation(logits)
        if self.config.contraction == "sphere":
            return density
        inside = (self._centred(positions.detach()).abs() <= 1.0).all(dim=1)
        return torch.where(inside, density, torch.zeros_like(density))

    def _color(self, geometry: Tensor, directions: Tensor | None) -> Tensor:
        if directions is not None:
            harmonics = spherical_harmonics(directions, self.config.view_degree)
            geometry = torch.cat([geometry, harmonics], dim=1)
        return torch.sigmoid(_network(self.color_layers, geometry).to(geometry.dtype))


def _network(layers: nn.ModuleList, x: Tensor) -> Tensor:
    """The layers with ReLU in between."""
    for number, layer in enumerate(layers):
        x = layer(torch.relu(x) if number else x)
    return x
