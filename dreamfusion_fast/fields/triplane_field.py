"""A field of three planes of features and one small MLP: what a network can make in one pass, many scenes at once."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from dreamfusion_fast.fields.encoded import EncodedField, EncodedFieldConfig
from dreamfusion_fast.fields.samples import FieldSamples
from dreamfusion_fast.fields.tile_source import TileSource
from dreamfusion_fast.ops.tiles import triplane as triplane_tile
from dreamfusion_fast.ops.tiles.triplane import TriplaneTileLayout
from dreamfusion_fast.ops.triplane import (
    PLANES,
    check_sides,
    triplane,
    triplane_position_gradient,
    triplane_position_gradient_reference,
    triplane_reference,
)
from dreamfusion_fast.settings import Range

# The extra of a render that says of which scene a ray is.
SCENE = "scene"


@dataclass(frozen=True)
class TriplaneFieldConfig(EncodedFieldConfig):
    """Settings of :class:`TriplaneField`."""

    kind: Literal["triplane"] = "triplane"
    """Tells the configs of fields apart."""
    resolution: Annotated[int, Range(3, 4096)] = 128
    """Vertices along a side of each plane."""
    features: Annotated[int, Range(1, 1024)] = 16
    """Features per vertex. The MLP reads three times as many; multiples of 4 are fast on a GPU, and so are at most 40,
    for which its kernels serve."""
    degree: Literal[1, 2] = 2
    """Degree of the B-splines that planes are read by: 1 is bilinear, whose normals jump between cells, 2 is smooth."""
    scenes: Annotated[int, Range(1, 65536)] = 1
    """Scenes that the field holds; with several, each render is told of which one its rays are."""

    def build(
        self, aabb: Tensor | tuple[float, ...] | None = None, generator: torch.Generator | None = None
    ) -> TriplaneField:
        """The field; arguments as of :class:`TriplaneField`."""
        return TriplaneField(self, aabb, generator)


class TriplaneField(EncodedField):
    """Density and albedo from a triplane (Chan et al. 2022) and one MLP, with a density blob at the box's centre.

    The features of the three planes are concatenated. A field of several scenes has one MLP for all, and planes for
    each: `needs` then names the extra `scene`, integers `[n_rays]`, which each render has to be given. Its `density` at
    a position is the largest of all scenes, so that one occupancy grid does for them.

    Example:
        >>> import torch
        >>> from dreamfusion_fast.fields import TriplaneField, TriplaneFieldConfig
        >>> field = TriplaneField(TriplaneFieldConfig(resolution=32, features=8))
        >>> output = field(torch.rand(5, 3) - 0.5, with_normal=True)
        >>> output.density.shape, output.color.shape, output.normal.shape
        (torch.Size([5]), torch.Size([5, 3]), torch.Size([5, 3]))
        >>> made = torch.zeros(2, 3, 32, 32, 8, requires_grad=True)  # by a network, say
        >>> field.with_planes(made).needs
        ('positions', 'scene')

    Attributes:
        planes: `[scenes, 3, resolution, resolution, features]`, over (x, y), (x, z) and (y, z).
    """

    config: TriplaneFieldConfig
    planes: Tensor

    def __init__(
        self,
        config: TriplaneFieldConfig | None = None,
        aabb: Tensor | tuple[float, ...] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Initialise from `generator` (torch's global one if None): planes U(-1e-4, 1e-4), layers U(+-1/sqrt(fan in)).

        Args:
            config: settings.
            aabb: scene box `[6]`; [-1, 1]^3 if None.
            generator: a CPU generator that makes the initial parameters reproducible.
        """
        super().__init__(aabb)
        self.config = config or TriplaneFieldConfig()
        c = self.config
        shape = (c.scenes, PLANES, c.resolution, c.resolution, c.features)
        self.planes = nn.Parameter(torch.empty(shape).uniform_(-1e-4, 1e-4, generator=generator))
        self._build_decoder(PLANES * c.features, generator)
        self._layout = TriplaneTileLayout(c.degree)
        native = c.backend == "native"
        self._triplane = triplane if native else triplane_reference
        self._position_gradient = triplane_position_gradient if native else triplane_position_gradient_reference
        self._set_needs()

    def _set_needs(self) -> None:
        self.needs = ("positions", SCENE) if self.planes.shape[0] > 1 else ("positions",)

    def with_planes(self, planes: Tensor) -> TriplaneField:
        """A field that reads these planes and has this one's MLP and box: not a copy of them, the same.

        Gradients go to the planes, and through them to whatever made them. They are no parameter of the new field,
        which has the MLP alone, and `.to` does not move them.

        Args:
            planes: `[n_scenes, 3, height, width, features]`, of the field's dtype and device. Sides may be any.

        Raises:
            TypeError, ValueError: planes of another dtype, shape or device.
        """
        features = self.config.features
        if not isinstance(planes, Tensor) or planes.dtype != self.planes.dtype:
            given = planes.dtype if isinstance(planes, Tensor) else type(planes).__name__
            raise TypeError(f"planes: got {given}, want {self.planes.dtype}, the field's")
        if planes.dim() != 5 or planes.shape[1] != PLANES or planes.shape[4] != features:
            raise ValueError(f"planes: got shape {list(planes.shape)}, want [n_scenes, 3, height, width, {features}]")
        check_sides("TriplaneField.with_planes", planes.shape, self.config.degree)
        if planes.device != self.planes.device:
            raise ValueError(f"planes: are on {planes.device}, want {self.planes.device}, where the field is")
        field = copy.copy(self)
        field._parameters = {name: value for name, value in self._parameters.items() if name != "planes"}
        vars(field).pop("planes", None)
        object.__setattr__(field, "planes", planes)
        field._set_needs()
        return field

    def of_scene(self, scene: int) -> TriplaneField:
        """The field of one of the scenes, such as for a mesh; its planes are a view of this one's.

        Raises:
            ValueError: there is no such scene.
        """
        if not 0 <= scene < self.planes.shape[0]:
            raise ValueError(f"scene: got {scene}, want 0 to {self.planes.shape[0] - 1}")
        return self.with_planes(self.planes[scene : scene + 1])

    @property
    def _table(self) -> Tensor:
        return self.planes

    def _features(self, unit: Tensor, scenes: Tensor | None) -> Tensor:
        return self._triplane(unit, self.planes, scenes, self.config.degree)

    def _slopes(self, grad_features: Tensor, unit: Tensor, scenes: Tensor | None) -> Tensor:
        return self._position_gradient(grad_features, unit, self.planes, scenes, self.config.degree)

    def _parts(self, positions: Any) -> tuple[Tensor, Tensor | None]:
        if self.planes.shape[0] == 1:
            return positions, None
        if not isinstance(positions, FieldSamples):
            raise TypeError(f"positions: got {type(positions).__name__}, want FieldSamples, or a field of one scene")
        return positions.positions, positions.extras[SCENE]

    def _density_anywhere(self, positions: Tensor) -> Tensor:
        """The largest of the scenes' densities, so that one occupancy grid does for all."""
        largest = self._density_at(positions, None)
        for scene in range(1, self.planes.shape[0]):
            scenes = torch.full_like(positions[:, 0], scene, dtype=torch.int32)
            largest = torch.maximum(largest, self._density_at(positions, scenes))
        return largest

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The planes, unless they were given, and the MLP's parameters."""
        groups = {"mlp": list(self.layers.parameters())}
        return {"planes": [self.planes], **groups} if isinstance(self.planes, nn.Parameter) else groups

    def tile_source(self) -> TileSource | None:
        """Planes, MLP and what becomes of its outputs; None with the reference backend."""
        if self.config.backend != "native":
            return None
        scene = SCENE if self.planes.shape[0] > 1 else None
        return TileSource(triplane_tile, self.planes, self._layout, **self._decoder_source(), scene=scene)
