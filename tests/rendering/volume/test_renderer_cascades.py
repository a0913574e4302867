"""VolumeRenderer in scenes larger than the box: cascades and growing steps against dense rendering in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.fields import HashGridField, HashGridFieldConfig
from dreamfusion_fast.rendering import (
    OccupancyGrid,
    Rays,
    RendererConfig,
    RenderOutput,
    VolumeRenderer,
    cone_distances,
    orbit_cameras,
    shade,
)

LIGHT = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
REACH = (-4.0, -4.0, -4.0, 4.0, 4.0, 4.0)  # the third cascade over [-1, 1]^3
STEP, NEAR, ANGLE, MAX_STEP = 0.06, 0.2, 0.07, 0.4
CONE = RendererConfig(step=STEP, near=NEAR, cone_angle=ANGLE, max_step=MAX_STEP)
RESOLUTION = 8


def make_field(backend: str = "reference") -> HashGridField:
    config = HashGridFieldConfig(
        levels=3, log2_rows=8, base_resolution=3, finest_resolution=9, hidden=8, smoothstep=True, backend=backend
    )
    field = HashGridField(config, REACH, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        field.table.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(2))
    return field


def make_rays() -> Rays:
    """From inside the second cascade, from inside the first, and from outside of all."""
    views = [
        orbit_cameras(1, elevation_deg=20, start_deg=30, distance=distance).rays(4, 4) for distance in (0.7, 1.7, 9.0)
    ]
    origins, directions = (torch.cat([getattr(view, of) for view in views]) for of in ("origins", "directions"))
    return Rays.normalized(origins.double(), directions.double())[0]


def make_occupied(share: float) -> Tensor:
    shape = (3, RESOLUTION, RESOLUTION, RESOLUTION)
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) < share


def cells_of(positions: Tensor) -> tuple[Tensor, ...]:
    """Cascade and cell of positions in [-4, 4)^3."""
    cascade = torch.zeros(positions.shape[:-1], dtype=torch.int64)
    for bound in (1.0, 2.0):
        cascade += ((positions < -bound) | (positions >= bound)).any(dim=-1)
    cell = ((positions / 2.0 ** cascade[..., None] + 1) * (RESOLUTION / 2)).floor().long()
    return cascade, *cell.unbind(dim=-1)


def dense(field: HashGridField, rays: Rays, occupied: Tensor, background: Tensor, shading: str) -> RenderOutput:
    """The textbook's sum over a rectangle of samples, those in empty cells and outside weighing nothing."""
    low, high = (-4.0 - rays.origins) / rays.directions, (4.0 - rays.origins) / rays.directions
    t_near = torch.minimum(low, high).amax(dim=1).clamp(min=NEAR)
    t_far = torch.maximum(low, high).amin(dim=1)
    edges = cone_distances(NEAR, 30.0, STEP, MAX_STEP, ANGLE, torch.float64)
    assert float(t_far[t_near < t_far].max()) < 30.0
    t = (0.5 * (edges[1:] + edges[:-1])).expand(len(rays), -1)
    positions = rays.origins[:, None] + t[..., None] * rays.directions[:, None]
    kept = (t >= t_near[:, None]) & (t < t_far[:, None])
    kept &= occupied[cells_of(torch.where(kept[..., None], positions.detach(), 0.0))]
    assert 0.0 < float(kept.double().mean()) < 1.0
    flat = positions.reshape(-1, 3)
    output = field(flat, with_normal=True)
    colors = shade(output.color, output.normal, flat, LIGHT, shading).view(*t.shape, 3)
    alpha = 1 - torch.exp(-output.density.view(t.shape) * kept * edges.diff())
    transmittance = torch.cumprod(torch.cat([torch.ones_like(t[:, :1]), 1 - alpha[:, :-1]], dim=1), dim=1)
    weights = alpha * transmittance
    opacity = weights.sum(dim=1)
    color = (weights[..., None] * colors).sum(dim=1) + (1 - opacity[:, None]) * background
    normals = output.normal.view(*t.shape, 3)
    away = (normals * rays.directions[:, None]).sum(dim=2).clamp(min=0)
    orientation = (weights.detach() * away.square()).sum() / len(rays)
    normal = (weights[..., None] * normals).sum(dim=1)
    return RenderOutput(color, opacity, (weights * t).sum(dim=1), normal, orientation, int(kept.sum()))


def loss_of(output: RenderOutput) -> Tensor:
    n = output.color.shape[0]
    mix = torch.linspace(-1, 1, n * 3, dtype=output.color.dtype).view(n, 3)
    loss = (output.color * mix).sum() + (output.opacity * mix[:, 0].cos()).sum() + (output.depth * mix[:, 1]).sum()
    return loss + (output.normal * mix.sin()).sum() + 5 * output.orientation_loss


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("chunk", [10**9, 150])
@pytest.mark.parametrize(("shading", "share"), [("albedo", 1.1), ("lambertian", 0.4)])
def test_values_and_gradients_against_dense_rendering(backend: str, chunk: int, shading: str, share: float) -> None:
    rays, occupied = make_rays(), make_occupied(share)
    background = torch.rand(len(rays), 3, dtype=torch.float64, requires_grad=True)
    results = []
    for who in (backend, "dense"):
        field = make_field(backend if who == backend else "reference")
        if who == "dense":
            output = dense(field, rays, occupied, background, shading)
        else:
            grid = OccupancyGrid(resolution=RESOLUTION, cascades=3, backend=backend)
            grid.set_occupied(occupied)
            view = VolumeRenderer(field, grid, replace(CONE, max_samples_per_chunk=chunk, backend=backend))
            output = view.render(rays, background, shading=shading, light=LIGHT, with_normals=True)
            assert chunk == 10**9 or output.samples > 3 * chunk
        results.append((output, torch.autograd.grad(loss_of(output), [*field.parameters(), background])))
    (output, gradients), (expected_output, expected) = results
    assert output.samples == expected_output.samples
    for name in ("color", "opacity", "depth", "normal", "orientation_loss"):
        torch.testing.assert_close(getattr(output, name), getattr(expected_output, name), rtol=1e-9, atol=1e-11)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * float(b.abs().max()))


def test_native_and_reference_agree(device: torch.device) -> None:
    outputs = []
    for backend in ("native", "reference"):
        grid = OccupancyGrid(resolution=RESOLUTION, cascades=3, backend=backend)
        grid.set_occupied(make_occupied(0.4))
        view = VolumeRenderer(make_field("reference").float(), grid, replace(CONE, backend=backend)).to(device)
        outputs.append(view.render(make_rays().to(device, torch.float32), jitter=True, seed=5))
    assert outputs[0].samples == outputs[1].samples > 0
    torch.testing.assert_close(outputs[0].color, outputs[1].color, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[0].depth, outputs[1].depth, rtol=1e-4, atol=1e-5)


def test_early_stop_measures_each_sample_by_its_length() -> None:
    """In a fog of density 1 what reaches a sample is exp(near - d_k), whatever lengths lie before it."""

    def fog(positions: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(positions[:, 0]), torch.ones_like(positions)

    rays = Rays(torch.zeros(3, 3).double(), torch.eye(3).double())
    grid = OccupancyGrid(resolution=RESOLUTION, cascades=3)
    edges = cone_distances(NEAR, 4.0, STEP, MAX_STEP, ANGLE, torch.float64)
    for chunk in (10**9, 10):
        output = VolumeRenderer(fog, grid, replace(CONE, max_samples_per_chunk=chunk, early_stop=0.1)).render(rays)
        count = int((torch.exp(NEAR - edges[:-1]) >= 0.1).sum())
        assert 10 < count < len(edges) - 3
        assert output.samples == 3 * count
        opacity = 1 - torch.exp(NEAR - edges[count])
        torch.testing.assert_close(output.opacity, opacity.expand(3), rtol=1e-12, atol=0)


def test_cascades_with_equal_steps_see_what_is_far_away() -> None:
    """A ball outside of the first cascade's box, opaque and red."""

    def ball(positions: Tensor) -> tuple[Tensor, Tensor]:
        inside = (positions - torch.tensor([3.0, 0.0, 0.0])).norm(dim=1) < 0.5
        return 1e3 * inside, torch.tensor([1.0, 0.0, 0.0]).expand_as(positions)

    rays = Rays(torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]))
    grid = OccupancyGrid(resolution=16, cascades=3)
    grid.update(ball, step=0)
    for config in (RendererConfig(step=0.01), RendererConfig(step=0.01, near=0.1, cone_angle=0.005)):
        output = VolumeRenderer(ball, grid, config).render(rays)
        torch.testing.assert_close(output.opacity, torch.tensor([1.0, 0.0]), rtol=1e-4, atol=0)
        assert float(output.depth[0]) == pytest.approx(2.5, abs=0.02)
        assert output.samples < 150
    assert VolumeRenderer(ball, OccupancyGrid(resolution=16)).render(rays).opacity.tolist() == [0.0, 0.0]


def test_a_finite_far_and_no_rays() -> None:
    field, grid, rays = make_field(), OccupancyGrid(resolution=RESOLUTION, cascades=3), make_rays()
    near, far = (VolumeRenderer(field, grid, replace(CONE, far=far)).render(rays) for far in (3.0, 100.0))
    assert 0 < near.samples < far.samples
    unlimited = VolumeRenderer(field, grid, CONE).render(rays)
    assert unlimited.samples == far.samples
    assert torch.equal(unlimited.color, far.color)
    assert VolumeRenderer(field, grid, CONE).render(rays[:0]).color.shape == (0, 3)
    away = Rays(rays.origins[-1:], -rays.directions[-1:])
    assert VolumeRenderer(field, grid, CONE).render(away).samples == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cone_angle": -0.1}, "cone_angle: got -0.1, want at least 0"),
        ({"max_step": 0.0}, "max_step: got 0.0, want above 0"),
        ({"cone_angle": 0.0}, "max_step, cone_angle: got 0.4, 0.0, want both above 0"),
        ({"max_step": 0.05}, "max_step: got 0.05, want at least the step, 0.06"),
    ],
)
def test_bad_settings_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VolumeRenderer(make_field(), config=replace(CONE, **change))
