"""VolumeRenderer: gradients against dense rendering in float64, chunked and not, and the memory held for them."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dreamfusion_fast.fields import HashGridField, HashGridFieldConfig, MlpBackground
from dreamfusion_fast.rendering import (
    OccupancyGrid,
    Rays,
    RendererConfig,
    RenderOutput,
    VolumeRenderer,
    orbit_cameras,
    shade,
)

LIGHT = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
STEP = 0.05


def make_field(backend: str = "reference", smoothstep: bool = True) -> HashGridField:
    config = HashGridFieldConfig(
        levels=3, log2_rows=8, base_resolution=3, finest_resolution=9, hidden=8, smoothstep=smoothstep, backend=backend
    )
    field = HashGridField(config, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        field.table.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(2))
    return field


def make_rays(size: int = 7) -> Rays:
    rays = orbit_cameras(1, elevation_deg=20, start_deg=30).rays(size, size).to(dtype=torch.float64)
    return Rays.normalized(rays.origins, rays.directions)[0]


def loss_of(output: RenderOutput) -> Tensor:
    """Reads every output that has gradients, each with weights of its own."""
    n = output.color.shape[0]
    mix = torch.linspace(-1, 1, n * 3, dtype=output.color.dtype).view(n, 3)
    loss = (output.color * mix).sum() + (output.opacity * mix[:, 0].cos()).sum() + (output.depth * mix[:, 1]).sum()
    if output.normal is not None:
        loss = loss + (output.normal * mix.sin()).sum() + 5 * output.orientation_loss
    return loss


def dense(field: nn.Module, rays: Rays, background: Tensor, shading: str, with_normals: bool) -> RenderOutput:
    """The same image by the textbook: a rectangle of samples, a cumulative product, no chunks, nothing skipped."""
    low, high = (-1.0 - rays.origins) / rays.directions, (1.0 - rays.origins) / rays.directions
    t_near = torch.minimum(low, high).amax(dim=1).clamp(min=0)
    t_far = torch.maximum(low, high).amin(dim=1)
    t = t_near[:, None] + (torch.arange(80, dtype=torch.float64) + 0.5) * STEP
    assert float((t_far - t_near).max()) < 79 * STEP
    positions = rays.origins[:, None] + t[..., None] * rays.directions[:, None]
    output = field(positions.reshape(-1, 3), with_normal=with_normals)
    colors = shade(output.color, output.normal, positions.reshape(-1, 3), LIGHT, shading).view(*t.shape, 3)
    alpha = 1 - torch.exp(-output.density.view(t.shape) * (t < t_far[:, None]) * STEP)
    transmittance = torch.cumprod(torch.cat([torch.ones_like(t[:, :1]), 1 - alpha[:, :-1]], dim=1), dim=1)
    weights = alpha * transmittance
    opacity = weights.sum(dim=1)
    color = (weights[..., None] * colors).sum(dim=1) + (1 - opacity[:, None]) * background
    normal = orientation = None
    if with_normals:
        normals = output.normal.view(*t.shape, 3)
        normal = (weights[..., None] * normals).sum(dim=1)
        away = (normals * rays.directions[:, None]).sum(dim=2).clamp(min=0)
        orientation = (weights.detach() * away.square()).sum() / len(rays)
    return RenderOutput(color, opacity, (weights * t).sum(dim=1), normal, orientation, t.numel())


def gradients(field: nn.Module, extra: list[Tensor], render: Callable[[], RenderOutput]) -> tuple[RenderOutput, list]:
    tensors = [*field.parameters(), *extra]
    output = render()
    return output, list(torch.autograd.grad(loss_of(output), tensors))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("chunk", [10**9, 200])
@pytest.mark.parametrize(("shading", "with_normals"), [("albedo", False), ("albedo", True), ("lambertian", True)])
def test_gradients_against_dense_rendering(backend: str, chunk: int, shading: str, with_normals: bool) -> None:
    field, rays = make_field(backend), make_rays()
    background = torch.rand(49, 3, dtype=torch.float64, requires_grad=True)
    config = RendererConfig(step=STEP, max_samples_per_chunk=chunk, backend=backend)
    view = VolumeRenderer(field, config=config)
    output, given = gradients(
        field,
        [background],
        lambda: view.render(rays, background, shading=shading, light=LIGHT, with_normals=with_normals),
    )
    reference = make_field("reference")
    expected_output, expected = gradients(
        reference, [background], lambda: dense(reference, rays, background, shading, with_normals)
    )
    assert output.samples > 5 * chunk or chunk == 10**9
    for name in ("color", "opacity", "depth", "normal", "orientation_loss"):
        torch.testing.assert_close(getattr(output, name), getattr(expected_output, name), rtol=1e-9, atol=1e-11)
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * float(b.abs().max()))


def test_gradients_reach_the_rays_through_the_positions() -> None:
    results = []
    for chunk in (10**9, 300):
        rays, field = make_rays(), make_field()
        rays.origins.requires_grad_(True)
        rays.directions.requires_grad_(True)
        view = VolumeRenderer(field, config=RendererConfig(step=STEP, max_samples_per_chunk=chunk, backend="reference"))
        output = view.render(rays, shading="lambertian", light=LIGHT)
        results.append(torch.autograd.grad(loss_of(output), [rays.origins, rays.directions]))
    for whole, parts in zip(*results, strict=True):
        assert float(whole.abs().max()) > 0
        torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-11)


def test_gradient_of_a_learned_background() -> None:
    field, rays, background = make_field(), make_rays(), MlpBackground().double()
    view = VolumeRenderer(field, config=RendererConfig(step=STEP, max_samples_per_chunk=300, backend="reference"))
    output = view.render(rays, background)
    given = torch.autograd.grad(output.color.sum(), list(background.parameters()))
    weight = (1 - output.opacity.detach())[:, None]
    expected = torch.autograd.grad((weight * background(rays.directions)).sum(), list(background.parameters()))
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_changing_parameters_before_backward_is_an_error() -> None:
    field = make_field()
    config = RendererConfig(step=STEP, max_samples_per_chunk=300, backend="reference")
    output = VolumeRenderer(field, config=config).render(make_rays())
    with torch.no_grad():
        field.table.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.color.sum().backward()


def test_autocast_is_repeated_in_backward() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)
            self.seen: list[torch.dtype] = []

        def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
            out = self.layer(positions)
            if positions.shape[0] > 1:
                self.seen.append(out.dtype)
            return out[:, 0].float().exp(), out[:, 1:].float().sigmoid()

    torch.manual_seed(0)
    field = Linear()
    rays = make_rays().to(dtype=torch.float32)
    config = RendererConfig(step=STEP, max_samples_per_chunk=300, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = VolumeRenderer(field, config=config).render(rays)
    forward_passes = len(field.seen)
    output.color.sum().backward()
    assert len(field.seen) == 2 * forward_passes
    assert set(field.seen) == {torch.bfloat16}


class Held:
    """A tensor that autograd keeps for backward; lives as long as autograd keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("with_normals", [False, True])
def test_held_memory_does_not_grow_with_the_activations(with_normals: bool) -> None:
    """Between forward and backward, chunks hold their rays and distances only."""
    occupancy = OccupancyGrid(resolution=4, backend="reference")

    def held(size: int, chunk: int) -> tuple[int, int]:
        alive: weakref.WeakSet[Held] = weakref.WeakSet()

        def pack(tensor: Tensor) -> Held:
            alive.add(held := Held(tensor.detach()))  # a result would hold the graph that holds it
            return held

        field = make_field()
        config = RendererConfig(step=0.02, max_samples_per_chunk=chunk, backend="reference")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            output = VolumeRenderer(field, occupancy, config).render(make_rays(size), with_normals=with_normals)
        own = {p.untyped_storage().data_ptr() for p in field.parameters()}
        storages = {held.tensor.untyped_storage() for held in alive}
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(size for address, size in sizes.items() if address not in own), output.samples

    kept, samples = held(12, 10**9)
    streamed, _ = held(12, 2000)
    assert kept > 200 * samples
    # Origins and directions of each ray, 8 bytes a number, and what the background's sum keeps.
    assert streamed < 200 * 12 * 12


def test_gradients_accumulate_over_backward_calls() -> None:
    field, rays = make_field(), make_rays()
    view = VolumeRenderer(field, config=RendererConfig(step=STEP, max_samples_per_chunk=300, backend="reference"))
    view.render(rays).color.sum().backward()
    once = [p.grad.clone() for p in field.parameters()]
    view.render(rays).color.sum().backward()
    for p, grad in zip(field.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * grad)


def test_field_and_renderer_fit_a_colour() -> None:
    """A few steps of Adam turn the grey blob red and opaque: all parts work together in float32."""
    config = HashGridFieldConfig(levels=4, log2_rows=10, base_resolution=4, finest_resolution=16, hidden=16)
    field = HashGridField(config, generator=torch.Generator().manual_seed(0))
    occupancy = OccupancyGrid(resolution=16)
    view = VolumeRenderer(field, occupancy, RendererConfig(samples_across=64))
    optimizer = torch.optim.Adam(field.parameters(), lr=0.02)
    rays = orbit_cameras(2).rays(8, 8)
    red = torch.tensor([1.0, 0.0, 0.0])
    for step in range(25):
        occupancy.update(field, step)
        output = view.render(rays, jitter=True, seed=step)
        hit = output.opacity.detach() > 0.3
        loss = (output.color[hit] - red).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 0:
            first = loss.item()
    assert int(hit.sum()) > 5
    assert loss.item() < 0.2 * first
