"""Which dtypes go where: the grid is float32 always, rays are float32 or float64, results are of the rays' dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from streaming_cases import make_field, make_rays
from torch import Tensor, nn

from dreamfusion_fast.fields import HashGridField, HashGridFieldConfig
from dreamfusion_fast.rendering import (
    CameraConfig,
    OccupancyGrid,
    Rays,
    RendererConfig,
    VolumeRenderer,
    orbit_cameras,
    sample_cameras,
)

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture
def doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def ball(positions: Tensor) -> tuple[Tensor, Tensor]:
    return 20.0 * torch.sigmoid(30.0 * (0.5 - positions.norm(dim=1))), positions.sigmoid()


@pytest.mark.parametrize(
    "convert",
    [
        lambda grid: grid.double(),
        lambda grid: grid.half(),
        lambda grid: grid.bfloat16(),
        lambda grid: grid.to("cpu", torch.float16),
        lambda grid: nn.ModuleList([grid]).half()[0],
    ],
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_grid_keeps_its_types_and_values(convert: Callable[[OccupancyGrid], OccupancyGrid], backend: str) -> None:
    grids = [OccupancyGrid((-1.1, -1.0, -1.0, 1.0, 1.3, 1.0), resolution=9, backend=backend) for _ in range(2)]
    grids[0].update(ball, 0)
    grids[1].update(ball, 0)
    convert(grids[0])
    for step in (16, 272):
        assert all(grid.update(ball, step) for grid in grids)
    for name, buffer in grids[1].named_buffers():
        assert buffer.dtype == (torch.uint8 if name == "bitfield" else torch.float32)
        assert torch.equal(grids[0].get_buffer(name), buffer)
    assert grids[0].to("meta").grid.device.type == "meta"


def test_an_update_asks_a_field_in_its_own_dtype() -> None:
    grids = [OccupancyGrid(resolution=9), OccupancyGrid(resolution=9)]
    for grid, dtype in zip(grids, (torch.float32, torch.float64), strict=True):
        view = VolumeRenderer(make_field(dtype=torch.float32), grid).to(dtype)
        grid.update(view.field, 0)
        assert view.render(make_rays(dtype=dtype)).color.dtype == dtype
    torch.testing.assert_close(grids[0].grid, grids[1].grid, rtol=1e-4, atol=1e-5)


def test_everything_in_float64_by_default(doubles: None) -> None:
    torch.manual_seed(0)
    field = HashGridField(HashGridFieldConfig(levels=2, log2_rows=8, finest_resolution=32, hidden=16))
    single = OccupancyGrid(resolution=7)
    for source in (field, ball):
        grid = OccupancyGrid(resolution=7)
        assert grid.grid.dtype == torch.float32
        for step in (0, 256):
            grid.update(source, step)
        for cameras in (orbit_cameras(2), sample_cameras(CameraConfig(), 2, torch.Generator())):
            rays = cameras.rays(3, 5)
            assert rays.origins.dtype == torch.float64
            assert VolumeRenderer(source, grid).render(rays).color.dtype == torch.float64
    # The draws are those that there are without.
    torch.set_default_dtype(torch.float32)
    for step in (0, 256):
        single.update(ball, step)
    assert torch.equal(single.grid, grid.grid)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_refused_by_name(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"rays.origins: got {dtype}, want a tensor \[..., 3\] of float32 or float"):
        make_rays().to(dtype=dtype)
    with pytest.raises(TypeError, match=rf"rays.directions: got {dtype}, want"):
        Rays(torch.zeros(3, 3), torch.zeros(3, 3, dtype=dtype))
    cameras = orbit_cameras(3)
    with pytest.raises(TypeError, match=rf"cameras.camera_to_world: got {dtype}, want float32 or float64"):
        cameras.to(dtype=dtype)
    view = VolumeRenderer(make_field())
    before = [parameter.clone() for parameter in view.parameters()]
    message = (
        rf"HashGridField: got {dtype} for its parameters, want torch.float32 or torch.float64; HashGridFieldConfig"
    )
    with pytest.raises(TypeError, match=message):
        view.to(dtype)
    assert all(torch.equal(a, b) for a, b in zip(before, view.field.parameters(), strict=True))


@pytest.mark.parametrize(("of_field", "of_rays"), [("float32", "float64"), ("float64", "float32")])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_other_rays_than_the_built_in_field_are_named(of_field: str, of_rays: str, backend: str) -> None:
    view = VolumeRenderer(make_field(backend, getattr(torch, of_field)), config=RendererConfig(backend=backend))
    rays = make_rays(dtype=getattr(torch, of_rays))
    given = "rays" if backend == "native" else "positions"
    with pytest.raises(TypeError, match=rf"{given}: got torch.{of_rays}, want torch.{of_field}, the field's"):
        view.render(rays)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64, torch.int64])
@pytest.mark.parametrize("chunk", [None, 19])
@pytest.mark.parametrize("built_in", [True, False])
def test_lights_and_backgrounds_are_converted(dtype: torch.dtype, chunk: int | None, built_in: bool) -> None:
    field = make_field(dtype=torch.float32) if built_in else ball
    view = VolumeRenderer(field, config=RendererConfig(samples_across=20, max_samples_per_chunk=chunk))
    rays = make_rays(dtype=torch.float32)
    light, background = torch.tensor([1, 2, 3]), torch.tensor([0, 1, 1])
    expected = view.render(rays, background.float(), "lambertian", light.float())
    output = view.render(rays, background.to(dtype), "lambertian", light.to(dtype))
    assert output.color.dtype == output.opacity.dtype == torch.float32
    assert torch.equal(output.color, expected.color)
