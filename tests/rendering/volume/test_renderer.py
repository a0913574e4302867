"""VolumeRenderer: values against closed forms, conventions, invariances, errors."""

from __future__ import annotations

import doctest
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.fields import HashGridField, HashGridFieldConfig, MlpBackground
from dreamfusion_fast.rendering import (
    InvalidRaysError,
    OccupancyGrid,
    Rays,
    RendererConfig,
    RenderOutput,
    VolumeRenderer,
    orbit_cameras,
)
from dreamfusion_fast.rendering.volume import chunked, renderer

COARSE = RendererConfig(samples_across=96, backend="reference")


def gaussian(positions: Tensor, height: float = 9.0, width: float = 0.12) -> tuple[Tensor, Tensor]:
    """A Gaussian blob: its optical depth along a line is known, and the midpoint rule is exact to rounding for it."""
    return height * torch.exp(-positions.square().sum(dim=1) / (2 * width**2)), torch.sigmoid(3 * positions)


def hard_ball(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Opaque ball of radius 0.5, red where z > 0, else blue, half green where x > 0, half more where y > 0."""
    inside = positions.norm(dim=1) < 0.5
    red, blue = (positions[:, 2] > 0).to(positions), (positions[:, 2] <= 0).to(positions)
    green = 0.5 * (positions[:, 0] > 0) + 0.5 * (positions[:, 1] > 0)
    return 1e4 * inside, torch.stack([red, green.to(positions), blue], dim=1)


def soft_ball(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Density that rises smoothly through radius 0.5."""
    return 50 * torch.sigmoid(40 * (0.5 - positions.norm(dim=1))), torch.full_like(positions, 0.5)


def random_rays(count: int, dtype: torch.dtype = torch.float64) -> Rays:
    """Rays from around the box towards points in it; some miss."""
    generator = torch.Generator().manual_seed(5)
    origins = torch.randn(count, 3, generator=generator, dtype=dtype)
    origins = 3 * torch.nn.functional.normalize(origins, dim=1)
    targets = 2.4 * (torch.rand(count, 3, generator=generator, dtype=dtype) - 0.5)
    return Rays(origins, torch.nn.functional.normalize(targets - origins, dim=1))


def assert_same(a: RenderOutput, b: RenderOutput, **tolerance: float) -> None:
    for name in ("color", "opacity", "depth", "normal", "orientation_loss"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), **tolerance)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("count", [1, 113])
def test_opacity_and_depth_of_a_gaussian(backend: str, count: int) -> None:
    rays = random_rays(count)
    output = VolumeRenderer(gaussian, config=replace(COARSE, backend=backend)).render(rays)
    towards = -(rays.origins * rays.directions).sum(dim=1)
    closest = (rays.origins + towards[:, None] * rays.directions).square().sum(dim=1)
    optical = 9.0 * 0.12 * math.sqrt(2 * math.pi) * torch.exp(-closest / (2 * 0.12**2))
    torch.testing.assert_close(output.opacity, 1 - torch.exp(-optical), rtol=1e-6, atol=1e-9)
    assert output.normal is None
    assert output.orientation_loss is None
    # Half of the optical depth lies before the closest point, so the mean depth does, by less than the blob's reach.
    hit = output.opacity > 0.1
    lead = towards[hit] - output.depth[hit] / output.opacity[hit]
    assert ((lead > 0) & (lead < 3 * 0.12)).all()


def test_opacity_of_a_constant_density_ball() -> None:
    rays, sigma, radius = random_rays(113), 3.0, 0.7
    config = RendererConfig(samples_across=2000, backend="reference")
    field = lambda x: (sigma * (x.norm(dim=1) < radius), torch.ones_like(x))  # noqa: E731
    output = VolumeRenderer(field, config=config).render(rays)
    towards = -(rays.origins * rays.directions).sum(dim=1)
    closest = (rays.origins + towards[:, None] * rays.directions).square().sum(dim=1)
    chord = 2 * (radius**2 - closest).clamp(min=0).sqrt()
    # The sampled chord is off by at most a step, and d opacity / d chord is at most sigma.
    limit = sigma * VolumeRenderer(field, config=config).step_size
    torch.testing.assert_close(output.opacity, 1 - torch.exp(-sigma * chord), rtol=0, atol=limit)
    torch.testing.assert_close(output.color, output.opacity[:, None].expand(-1, 3))


def test_step_sizes() -> None:
    assert VolumeRenderer(gaussian).step_size == pytest.approx(2 * math.sqrt(3) / 512)
    assert VolumeRenderer(gaussian, config=RendererConfig(step=0.1)).step_size == 0.1
    grid = OccupancyGrid((0.0, 0.0, 0.0, 3.0, 4.0, 12.0))
    assert VolumeRenderer(gaussian, grid, RendererConfig(samples_across=13)).step_size == pytest.approx(1.0)


def test_camera_conventions() -> None:
    """The front camera sees +Z; +X is on the right of the image, +Y at its top."""
    cameras = orbit_cameras(4, elevation_deg=0)
    output = VolumeRenderer(hard_ball).render(cameras.rays(9, 9))
    front, right, back, _ = output.color.view(4, 9, 9, 3)
    assert front[4, 4, 0] > 0.99
    assert back[4, 4, 2] > 0.99
    assert front[4, 5, 1] > front[4, 3, 1] + 0.4
    assert back[4, 5, 1] < back[4, 3, 1] - 0.4
    assert front[3, 4, 1] > front[5, 4, 1] + 0.4
    # From +X, the front (+Z) is on the left.
    assert right[4, 3, 0] > 0.99
    assert right[4, 5, 2] > 0.99


def test_normals_of_a_ball_point_outward() -> None:
    rays = orbit_cameras(3, elevation_deg=20).rays(7, 7)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            output = VolumeRenderer(soft_ball).render(rays, with_normals=True)
        hit = output.opacity > 0.99
        assert int(hit.sum()) > 3
        surface = rays.origins + output.depth[:, None] * rays.directions
        normal = torch.nn.functional.normalize(output.normal[hit], dim=1)
        expected = torch.nn.functional.normalize(surface[hit], dim=1)
        assert ((normal * expected).sum(dim=1) > 0.95).all()
        assert 0 <= output.orientation_loss.item() < 0.05


def test_orientation_loss_sees_back_faces() -> None:
    """Density that grows towards the camera has all normals pointing away from it."""
    field = lambda x: (5 * torch.sigmoid(4 * x[:, 2]), torch.ones_like(x))  # noqa: E731
    rays = Rays(torch.tensor([[0.0, 0, 3]]), torch.tensor([[0.0, 0, -1]]))
    front = VolumeRenderer(field).render(rays, with_normals=True)
    torch.testing.assert_close(front.orientation_loss, front.opacity[0])
    behind = VolumeRenderer(field).render(Rays(-rays.origins, -rays.directions), with_normals=True)
    assert behind.orientation_loss.item() == 0


def test_lit_ball() -> None:
    """With the light at the camera the middle is brightest; textureless has no colour."""
    camera = orbit_cameras(1, elevation_deg=0)
    light = camera.positions[0]
    view = VolumeRenderer(soft_ball)
    lit = view.render(camera.rays(9, 9), shading="lambertian", light=light).color.view(9, 9, 3)
    assert 0.4 < lit[4, 4, 0] < 0.51
    assert lit[4, 4, 0] > lit[4, 2, 0]
    white = view.render(camera.rays(9, 9), shading="textureless", light=light.expand(81, 3)).color.view(9, 9, 3)
    torch.testing.assert_close(white, 2 * lit)
    dark = view.render(camera.rays(9, 9), shading="lambertian", light=light, ambient=0.0, diffuse=0.0)
    assert (dark.color == 0).all()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("chunk", [1, 37, 1000])
@pytest.mark.parametrize("march", [1 << 18, 50])
def test_chunks_change_nothing(backend: str, chunk: int, march: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "RAYS_PER_MARCH", march)
    rays, options = random_rays(113), {"background": torch.rand(113, 3).double(), "with_normals": True}
    config = RendererConfig(samples_across=48, backend=backend)
    whole = VolumeRenderer(gaussian, config=replace(config, max_samples_per_chunk=10**9)).render(rays, **options)
    parts = VolumeRenderer(gaussian, config=replace(config, max_samples_per_chunk=chunk)).render(rays, **options)
    assert parts.samples == whole.samples > 1000
    assert_same(parts, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_order_of_rays_changes_nothing(backend: str) -> None:
    rays, order = random_rays(113), torch.randperm(113)
    view = VolumeRenderer(gaussian, config=replace(COARSE, backend=backend))
    straight, shuffled = view.render(rays, with_normals=True), view.render(rays[order], with_normals=True)
    torch.testing.assert_close(shuffled.color, straight.color[order], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(shuffled.depth, straight.depth[order], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(shuffled.normal, straight.normal[order], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_pruning_empty_cells_changes_nothing(backend: str) -> None:
    """Cells whose density is zero everywhere may be left out."""
    size, radius = 20, 0.45
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)
    occupancy = OccupancyGrid(resolution=size, backend=backend)
    occupancy.set_occupied(grid.norm(dim=-1) < radius + math.sqrt(3) / size)
    field = lambda x: (8 * (x.norm(dim=1) < radius), torch.sigmoid(x))  # noqa: E731
    rays, config = random_rays(113), replace(COARSE, backend=backend)
    pruned = VolumeRenderer(field, occupancy, config).render(rays, jitter=True, seed=4)
    full = VolumeRenderer(field, None, config).render(rays, jitter=True, seed=4)
    assert 0 < pruned.samples < 0.5 * full.samples
    assert_same(pruned, full, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_jitter_is_seeded(backend: str) -> None:
    view = VolumeRenderer(gaussian, config=RendererConfig(samples_across=24, backend=backend))
    first, again, other = (view.render(random_rays(113), jitter=True, seed=s).color for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    still = view.render(random_rays(113)).color
    assert not torch.equal(first, still)
    torch.testing.assert_close(first, still, rtol=0, atol=0.1)


def test_native_and_reference_agree(device: torch.device) -> None:
    rays = random_rays(1023, torch.float32).to(device)
    occupancy = OccupancyGrid(resolution=24).to(device)
    occupancy.update(gaussian, 0)
    outputs = [
        VolumeRenderer(gaussian, occupancy, replace(COARSE, backend=backend))
        .to(device)
        .render(rays, shading="lambertian", light=torch.ones(3, device=device), jitter=True, seed=9)
        for backend in ("native", "reference")
    ]
    assert outputs[0].samples == outputs[1].samples > 0
    assert_same(*outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threshold", [1e-2, 1e-4])
def test_early_stop_drops_only_what_is_hidden(threshold: float) -> None:
    rays = random_rays(113)
    full = VolumeRenderer(soft_ball, config=COARSE).render(rays)
    for chunk in (None, 500):
        config = replace(COARSE, early_stop=threshold, max_samples_per_chunk=chunk)
        stopped = VolumeRenderer(soft_ball, config=config).render(rays)
        assert stopped.samples < 0.9 * full.samples
        torch.testing.assert_close(stopped.color, full.color, rtol=0, atol=threshold)
        torch.testing.assert_close(stopped.opacity, full.opacity, rtol=0, atol=threshold)


def test_near_and_far_clip() -> None:
    rays = Rays(torch.tensor([[0.0, 0, 3]]), torch.tensor([[0.0, 0, -1]]))
    haze = lambda x: (torch.ones(len(x)), torch.ones_like(x))  # noqa: E731
    output = VolumeRenderer(haze, config=RendererConfig(near=2.5, far=3.0, step=0.01)).render(rays)
    torch.testing.assert_close(output.opacity, torch.tensor([1 - math.exp(-0.5)]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["none", "color", "rows", "callable"])
def test_backgrounds(kind: str) -> None:
    rays = random_rays(113, torch.float32)
    rows = torch.rand(113, 3)
    mlp = MlpBackground()
    given, behind = {
        "none": (None, torch.zeros(3)),
        "color": (torch.tensor([0.2, 0.4, 0.6]), torch.tensor([0.2, 0.4, 0.6])),
        "rows": (rows, rows),
        "callable": (mlp, mlp(rays.directions)),
    }[kind]
    bare = VolumeRenderer(gaussian).render(rays)
    output = VolumeRenderer(gaussian).render(rays, background=given)
    torch.testing.assert_close(output.color, bare.color + (1 - bare.opacity[:, None]) * behind)


def test_no_rays_and_empty_space() -> None:
    nothing = VolumeRenderer(gaussian).render(Rays(torch.zeros(0, 3), torch.zeros(0, 3)), with_normals=True)
    assert nothing.color.shape == (0, 3)
    assert nothing.normal.shape == (0, 3)
    assert nothing.orientation_loss.item() == 0
    occupancy = OccupancyGrid(resolution=4)
    occupancy.set_occupied(torch.zeros(4, 4, 4, dtype=torch.bool))
    output = VolumeRenderer(gaussian, occupancy).render(random_rays(5, torch.float32), background=torch.ones(3))
    assert output.samples == 0
    assert (output.color == 1).all()
    assert (output.opacity == 0).all()


def test_non_contiguous_rays() -> None:
    rays = random_rays(113, torch.float32)
    both = torch.cat([rays.origins, rays.directions], dim=1)
    strided = Rays(both[:, :3], both[:, 3:])
    assert_same(VolumeRenderer(gaussian).render(strided), VolumeRenderer(gaussian).render(rays), rtol=0, atol=0)


@pytest.mark.parametrize("built_in", [True, False])
@pytest.mark.parametrize("chunk", [None, 17])
def test_transforms_of_torch_func_are_refused_in_one_line(built_in: bool, chunk: int | None) -> None:
    field = HashGridField(HashGridFieldConfig(levels=2, log2_rows=8, finest_resolution=32)) if built_in else gaussian
    view = VolumeRenderer(field, config=RendererConfig(samples_across=20, max_samples_per_chunk=chunk))
    rays = random_rays(8, torch.float32)
    parameters = {name: value.detach() for name, value in view.named_parameters()}

    def opacity(origins: Tensor, directions: Tensor = rays.directions) -> Tensor:
        return view.render(Rays(origins, directions)).opacity.sum()

    def of_parameters(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(view, parameters, (rays,)).opacity.sum()

    for transform in (
        lambda: torch.func.grad(opacity)(rays.origins),
        lambda: torch.func.grad(of_parameters)(parameters),
        lambda: torch.func.jvp(opacity, (rays.origins,), (rays.origins,)),
        lambda: torch.vmap(opacity)(rays.origins.view(2, 4, 3), rays.directions.view(2, 4, 3)),
    ):
        with pytest.raises(RuntimeError, match=r"^VolumeRenderer.render: cannot be called within torch.func trans.*$"):
            transform()
    torch.testing.assert_close(of_parameters(parameters), opacity(rays.origins))


def test_bad_input_is_named() -> None:
    view, rays = VolumeRenderer(gaussian), random_rays(5, torch.float32)
    rays.directions[2] = float("nan")
    with pytest.raises(InvalidRaysError, match="ray 2 is not finite"):
        view.render(rays)
    rays = random_rays(5, torch.float32)
    with pytest.raises(ValueError, match="shading: got 'shiny'"):
        view.render(rays, shading="shiny")
    with pytest.raises(ValueError, match=r"light: got None, want a position \[3\] or \[n_rays, 3\] for lambertian"):
        view.render(rays, shading="lambertian")
    with pytest.raises(ValueError, match=r"light: got shape \[4, 3\], want \[3\] or \[5, 3\]"):
        view.render(rays, light=torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"background: got shape \[3, 3\]"):
        view.render(rays, background=torch.zeros(3, 3))
    with pytest.raises(TypeError, match="field: got int"):
        VolumeRenderer(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples_across": 0}, "samples_across: got 0"),
        ({"step": 0.0}, "step: got 0.0"),
        ({"near": 2.0, "far": 1.0}, "near, far: got 2.0, 1.0"),
        ({"max_samples_per_chunk": 0}, "max_samples_per_chunk: got 0"),
        ({"early_stop": 1.0}, "early_stop: got 1.0"),
        ({"backend": "cuda"}, "backend: got 'cuda', want one of native, reference"),
    ],
)
def test_bad_settings_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RendererConfig(**change)


def test_docstring_example() -> None:
    result = doctest.testmod(renderer)
    assert result.attempted > 5
    assert result.failed == 0
