"""Occupancy grid, renderer and mesh ask a field in one and the same way, and lit renders are right in all modes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dreamfusion_fast.fields import FieldOutput, HashGridField, HashGridFieldConfig, query_density
from dreamfusion_fast.fields.base import tile_source_of
from dreamfusion_fast.fields.tile_source import TileSource
from dreamfusion_fast.rendering import OccupancyGrid, Rays, RendererConfig, RenderOutput, VolumeRenderer, orbit_cameras

LIGHT = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
CHUNKS = [None, 211, 53]


def pair(output: FieldOutput | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return (output.density, output.color) if isinstance(output, FieldOutput) else output[:2]


def make_rays(size: int = 7) -> Rays:
    rays = orbit_cameras(1, elevation_deg=20, start_deg=30).rays(size, size).to(dtype=torch.float64)
    return Rays.normalized(rays.origins, rays.directions)[0]


class Exponential(nn.Module):
    """Density from a submodule of that name, a logit."""

    def __init__(self) -> None:
        super().__init__()
        self.density = nn.Linear(3, 1).double()
        with torch.no_grad():
            self.density.weight.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
            self.density.bias.fill_(-0.3)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        logit = self.density(positions.to(torch.float64))[:, 0] - 9 * positions.square().sum(dim=1)
        return torch.exp(4 + logit), torch.sigmoid(positions.to(torch.float64))


class Halved(HashGridField):
    """Overrides forward."""

    def forward(self, positions: Tensor, with_normal: bool = False) -> FieldOutput:
        output = super().forward(positions, with_normal)
        return FieldOutput(0.5 * output.density, output.color.flip(1), output.normal)


class Sharper(HashGridField):
    """Overrides what forward and density are made of."""

    def _network(self, features: Tensor, outputs: int) -> tuple[Tensor, list[Tensor]]:
        logits, hidden = super()._network(features, outputs)
        return 3.0 * logits, hidden


class Grouped(HashGridField):
    """Overrides nothing that a call reads."""

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"mlp": list(self.parameters())}


class Lent(Halved):
    """Says what kernels read for the forward that it overrides."""

    def forward(self, positions: Tensor, with_normal: bool = False) -> FieldOutput:
        return HashGridField.forward(self, positions, with_normal)

    def tile_source(self) -> TileSource | None:
        return HashGridField.tile_source(self)


class Named(HashGridField):
    """Adds to the field, and changes nothing of it."""

    def __init__(self, name: str, config: HashGridFieldConfig, generator: torch.Generator) -> None:
        super().__init__(config, generator=generator)
        self.name = name

    def __repr__(self) -> str:
        return self.name


def make_grid_field(make: Callable[..., HashGridField] = HashGridField) -> HashGridField:
    config = HashGridFieldConfig(levels=3, log2_rows=8, base_resolution=3, finest_resolution=9, hidden=8)
    field = make(config=config, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        field.table.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(2))
    return field


def hooked() -> HashGridField:
    field = make_grid_field()
    field.register_forward_hook(lambda module, inputs, output: replace(output, density=0.5 * output.density))
    return field


def patched() -> HashGridField:
    field = make_grid_field()
    whole = field.forward
    field.forward = lambda x, with_normal=False: whole(0.8 * x, with_normal)  # type: ignore[method-assign]
    return field


STREAMED = ("as built in", "groups overridden", "source of its own", "nothing overridden")
FIELDS = {
    "submodule density": Exponential,
    "forward overridden": lambda: make_grid_field(Halved),
    "part overridden": lambda: make_grid_field(Sharper),
    "hook": hooked,
    "forward of the instance": patched,
    "as built in": make_grid_field,
    "groups overridden": lambda: make_grid_field(Grouped),
    "source of its own": lambda: make_grid_field(Lent),
    "nothing overridden": lambda: make_grid_field(lambda **options: Named("mine", **options)),
}


def render(field: Callable, grid: OccupancyGrid | None, chunk: int | None = None, **options: object) -> RenderOutput:
    config = RendererConfig(step=0.05, max_samples_per_chunk=chunk)
    return VolumeRenderer(field, grid, config).render(make_rays(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("early_stop", [0.0, 1e-3])
@pytest.mark.parametrize("kind", FIELDS)
def test_one_way_to_ask_a_field(kind: str, early_stop: float, chunk: int | None) -> None:
    """A function around the field has nothing but a call."""
    field = FIELDS[kind]()
    results = []
    for asked in (field, lambda x: pair(field(x))):
        grid = OccupancyGrid(resolution=8, step_size=0.05)
        # float32, as the grid's points are
        grid.update(lambda x, asked=asked: _single(asked, x), 0)
        config = RendererConfig(step=0.05, max_samples_per_chunk=chunk, early_stop=early_stop)
        output = VolumeRenderer(asked, grid, config).render(make_rays())
        x = 2 * torch.rand(57, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) - 1
        results.append((grid.grid, output.color, output.opacity, output.depth, query_density(asked, x)))
    assert float(results[0][2].detach().max()) > 0.1
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def _single(field: Callable, positions: Tensor) -> tuple[Tensor, Tensor]:
    density = query_density(field, positions.double())
    return density.float(), positions


@pytest.mark.parametrize("kind", FIELDS)
def test_what_streams(kind: str) -> None:
    """Only a field that does what the kernels do."""
    assert (tile_source_of(FIELDS[kind]()) is not None) == (kind in STREAMED)


@pytest.mark.quick(6)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("shading", ["albedo", "lambertian", "textureless"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_lit_renders_without_gradients(mode: Callable, shading: str, backend: str, chunk: int | None) -> None:
    for field in (Exponential(), make_grid_field(Halved), make_grid_field()):
        config = RendererConfig(step=0.05, max_samples_per_chunk=chunk, backend=backend)  # type: ignore[arg-type]
        view = VolumeRenderer(field, config=config)
        expected = view.render(make_rays(), shading=shading, light=LIGHT, with_normals=True)
        with mode():
            given = view.render(make_rays(), shading=shading, light=LIGHT, with_normals=True)
        assert float(expected.normal.detach().abs().max()) > 0.1
        for name in ("color", "opacity", "depth", "normal", "orientation_loss"):
            torch.testing.assert_close(getattr(given, name), getattr(expected, name).detach(), rtol=1e-12, atol=1e-14)
            assert not getattr(given, name).requires_grad


@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_lit_render_of_a_density_without_a_graph_is_an_error(chunk: int | None) -> None:
    class Cut(Exponential):
        forward = torch.no_grad()(Exponential.forward)

    assert float(render(Cut(), None, chunk).opacity.detach().max()) > 0.1
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(ValueError, match=r"^field: its density has no graph to the positions"):
            render(Cut(), None, chunk, shading="lambertian", light=LIGHT)
