"""Lit renders are right in all modes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dreamfusion_fast.fields import HashGridField, HashGridFieldConfig
from dreamfusion_fast.rendering import OccupancyGrid, Rays, RendererConfig, RenderOutput, VolumeRenderer, orbit_cameras

LIGHT = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
CHUNKS = [None, 211, 53]


def make_rays(size: int = 7) -> Rays:
    return orbit_cameras(1, elevation_deg=20, start_deg=30).rays(size, size).to(dtype=torch.float64).normalized()


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


def make_grid_field(make: Callable[..., HashGridField] = HashGridField) -> HashGridField:
    config = HashGridFieldConfig(levels=3, log2_rows=8, base_resolution=3, finest_resolution=9, hidden=8)
    field = make(config=config, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        field.table.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(2))
    return field


def render(field: Callable, grid: OccupancyGrid | None, chunk: int | None = None, **options: object) -> RenderOutput:
    config = RendererConfig(step=0.05, max_samples_per_chunk=chunk)
    return VolumeRenderer(field, grid, config).render(make_rays(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("shading", ["albedo", "lambertian", "textureless"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_lit_renders_without_gradients(mode: Callable, shading: str, backend: str, chunk: int | None) -> None:
    for field in (Exponential(), make_grid_field()):
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
