"""Fields that ask for more than positions, opacities in place of densities, channels, and samples handed out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreamfusion_fast.fields import FieldOutput, FieldSamples
from dreamfusion_fast.rendering import (
    InvalidRaysError,
    OccupancyGrid,
    Rays,
    RendererConfig,
    RenderOutput,
    VolumeRenderer,
    orbit_cameras,
)

STEP = 0.06
CHUNKS = [10**9, 150]


class Scene(nn.Module):
    """Colour by direction and appearance; density, or opacity by both ends of a sample; two channels."""

    needs = ("positions", "directions", "t_starts", "t_ends", "ray_indices", "appearance")

    def __init__(self, alpha: bool) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(1)
        self.by_place = nn.Parameter(torch.randn(3, 4, generator=draws, dtype=torch.float64))
        self.by_direction = nn.Parameter(torch.randn(3, 3, generator=draws, dtype=torch.float64))
        self.by_appearance = nn.Parameter(torch.randn(2, 3, generator=draws, dtype=torch.float64))
        self.alpha = alpha

    def forward(self, samples: FieldSamples) -> FieldOutput:
        places = torch.sin(samples.positions @ self.by_place)
        density = 2.0 * torch.nn.functional.softplus(places[:, 0] - 0.5)
        length = samples.t_ends - samples.t_starts
        looks = (
            places[:, 1:] + samples.directions @ self.by_direction + samples.extras["appearance"] @ self.by_appearance
        )
        channels = {"parity": (samples.ray_indices % 2).to(looks), "places": places}
        if self.alpha:
            return FieldOutput(alpha=1 - torch.exp(-density * length), color=torch.sigmoid(looks), channels=channels)
        return FieldOutput(density, torch.sigmoid(looks), channels=channels)


def make_rays(size: int = 7) -> Rays:
    return orbit_cameras(1, elevation_deg=20, start_deg=30).to(dtype=torch.float64).rays(size, size)


def make_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Origins, directions and appearances that want gradients."""
    rays = make_rays()
    appearance = torch.randn(len(rays), 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return tuple(t.clone().requires_grad_(True) for t in (rays.origins, rays.directions, appearance))


def dense(field: Scene, origins: Tensor, directions: Tensor, appearance: Tensor) -> dict[str, Tensor]:
    """By the textbook: a rectangle of samples, a cumulative product."""
    low, high = (-1.0 - origins.detach()) / directions.detach(), (1.0 - origins.detach()) / directions.detach()
    t_near, t_far = torch.minimum(low, high).amax(dim=1), torch.maximum(low, high).amin(dim=1)
    t = t_near[:, None] + (torch.arange(70, dtype=torch.float64) + 0.5) * STEP
    assert float((t_far - t_near).max()) < 69 * STEP
    inside = t < t_far[:, None]
    n, k = t.shape
    rows = torch.arange(n).repeat_interleave(k)
    positions = (origins[:, None] + t[..., None] * directions[:, None]).reshape(-1, 3)
    flat = t.reshape(-1)
    bounds = (flat - STEP / 2, flat + STEP / 2)
    samples = FieldSamples(positions, directions, rows, bounds, {"appearance": appearance})
    output = field(samples)
    alpha = output.alpha if field.alpha else 1 - torch.exp(-output.density * STEP)
    alpha = alpha.view(n, k) * inside
    transmittance = torch.cumprod(torch.cat([torch.ones_like(t[:, :1]), 1 - alpha[:, :-1]], dim=1), dim=1)
    weights = alpha * transmittance
    summed = {
        "color": output.color,
        "places": output.channels["places"],
        "parity": output.channels["parity"][:, None],
    }
    result = {name: (weights[..., None] * value.view(n, k, -1)).sum(dim=1) for name, value in summed.items()}
    return (
        result
        | {"opacity": weights.sum(dim=1), "depth": (weights * t).sum(dim=1), "weights": weights[inside]}
        | {"transmittance": transmittance[inside]}
    )


def outputs_of(output: RenderOutput) -> dict[str, Tensor]:
    found = {"color": output.color, "opacity": output.opacity, "depth": output.depth, **output.channels}
    if output.ray_samples is not None:
        found |= {"weights": output.ray_samples.weights, "transmittance": output.ray_samples.transmittance}
    return found


def gradients(outputs: dict[str, Tensor], tensors: list[Tensor]) -> list[Tensor]:
    draws = torch.Generator().manual_seed(3)
    loss = sum(
        (outputs[name] * torch.randn(outputs[name].shape, generator=draws, dtype=torch.float64)).sum()
        for name in sorted(outputs)
    )
    return list(torch.autograd.grad(loss, tensors))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("return_samples", [False, True])
def test_values_and_gradients_against_dense_rendering(
    return_samples: bool, alpha: bool, chunk: int, backend: str
) -> None:
    field, (origins, directions, appearance) = Scene(alpha), make_inputs()
    view = VolumeRenderer(field, config=RendererConfig(step=STEP, max_samples_per_chunk=chunk, backend=backend))
    output = view.render(Rays(origins, directions), extras={"appearance": appearance}, return_samples=return_samples)
    assert output.samples > 600
    assert output.channels["places"].shape == (49, 4)
    assert output.channels["parity"].shape == (49, 1)
    given, wanted = outputs_of(output), dense(field, origins, directions, appearance)
    wanted = {name: wanted[name] for name in given}
    for name, value in given.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-9, atol=1e-11, msg=name)
    tensors = [*field.parameters(), origins, directions, appearance]
    for a, b in zip(gradients(given, tensors), gradients(wanted, tensors), strict=True):
        assert float(b.abs().max()) > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * float(b.abs().max()))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_samples_that_are_handed_out(chunk: int) -> None:
    field, (origins, directions, appearance) = Scene(False), make_inputs()
    rays = Rays(origins, directions)
    view = VolumeRenderer(field, config=RendererConfig(step=STEP, max_samples_per_chunk=chunk))
    output = view.render(rays, extras={"appearance": appearance}, jitter=True, seed=4, return_samples=True)
    samples = output.ray_samples
    count = samples.t.shape[0]
    assert count == output.samples == int(samples.offsets[-1])
    assert samples.ray_indices.dtype == torch.int64
    assert torch.equal(samples.ray_indices.bincount(minlength=49), samples.offsets.diff().long())
    torch.testing.assert_close(samples.t, 0.5 * (samples.t_starts + samples.t_ends))
    torch.testing.assert_close(samples.t_ends - samples.t_starts, torch.full_like(samples.t, STEP))
    index = samples.ray_indices
    torch.testing.assert_close(samples.positions, origins[index] + samples.t[:, None] * directions[index])
    torch.testing.assert_close(samples.weights, samples.transmittance * (1 - torch.exp(-samples.field.density * STEP)))
    color = torch.zeros_like(output.color).index_add(0, index, samples.weights[:, None] * samples.field.color)
    torch.testing.assert_close(output.color, color)
    hit = output.opacity > 0
    torch.testing.assert_close(output.expected_depth[hit], (output.depth / output.opacity)[hit])


def test_expected_depth_of_a_miss_is_zero() -> None:
    away = Rays(torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
    output = VolumeRenderer(lambda x: (x[:, 0].abs(), x)).render(away)
    assert output.expected_depth.tolist() == [0.0]


@pytest.mark.parametrize("jitter", [False, True])
def test_samples_that_grow_touch_each_other(jitter: bool) -> None:
    """With a cone angle all rays share the bounds of samples, wherever jitter puts these within."""
    config = RendererConfig(step=0.02, cone_angle=0.05, far=6.0)
    rays = make_rays(5)
    view = VolumeRenderer(lambda x: (x.square().sum(dim=1), x.sigmoid()), config=config)
    samples = view.render(rays, jitter=jitter, seed=1, return_samples=True).ray_samples
    assert (samples.t_starts <= samples.t + 1e-12).all()
    assert (samples.t <= samples.t_ends + 1e-12).all()
    same = samples.ray_indices[1:] == samples.ray_indices[:-1]
    assert int(same.sum()) > 100
    torch.testing.assert_close(samples.t_starts[1:][same], samples.t_ends[:-1][same])
    lengths = samples.t_ends - samples.t_starts
    torch.testing.assert_close(lengths, (0.05 * samples.t_starts).clamp(min=0.02), rtol=1e-9, atol=1e-12)


def field_of(alpha: bool) -> Callable[[Any], FieldOutput]:
    def field(samples: FieldSamples) -> FieldOutput:
        density = 6.0 * torch.sin(3 * samples.positions).prod(dim=1).clamp(min=0)
        if alpha:
            return FieldOutput(alpha=1 - torch.exp(-density * STEP), color=samples.directions.abs())
        return FieldOutput(density, samples.directions.abs())

    field.needs = ("directions",)
    return field


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("threshold", [0.02, 0.1])
def test_alpha_threshold_drops_thin_samples_alone(threshold: float, alpha: bool) -> None:
    rays, config = make_rays(9), RendererConfig(step=STEP)
    full = VolumeRenderer(field_of(alpha), config=config).render(rays, return_samples=True)
    for chunk in CHUNKS:
        pruned_config = replace(config, alpha_threshold=threshold, max_samples_per_chunk=chunk)
        pruned = VolumeRenderer(field_of(alpha), config=pruned_config).render(rays, return_samples=True)
        samples = full.ray_samples
        kept = samples.weights / samples.transmittance >= threshold
        assert pruned.samples == int(kept.sum()) < full.samples
        assert pruned.samples > 50
        torch.testing.assert_close(pruned.ray_samples.t, samples.t[kept])
        torch.testing.assert_close(pruned.ray_samples.ray_indices, samples.ray_indices[kept])


@pytest.mark.parametrize("streams", [False, True])
def test_near_and_far_per_ray(streams: bool) -> None:
    """Each ray as if it were rendered with a config of its own."""
    from streaming_cases import make_field

    field = make_field("native") if streams else (lambda x: (3 * x.square().sum(dim=1), x.sigmoid()))
    rays = make_rays(5)
    near = torch.linspace(0.0, 2.5, 25, dtype=torch.float64)
    far = near + torch.linspace(-0.1, 1.5, 25, dtype=torch.float64)
    config = RendererConfig(step=STEP)
    output = VolumeRenderer(field, config=config).render(Rays(rays.origins, rays.directions, near, far))
    total = 0
    for i in range(25):
        if near[i] >= far[i]:
            assert output.opacity[i].item() == 0.0
            continue
        one = replace(config, near=float(near[i]), far=float(far[i]))
        wanted = VolumeRenderer(field, config=one).render(rays[i : i + 1])
        total += wanted.samples
        torch.testing.assert_close(output.color[i : i + 1], wanted.color, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(output.depth[i : i + 1], wanted.depth, rtol=1e-9, atol=1e-12)
    assert output.samples == total > 60


@pytest.mark.parametrize("streams", [False, True])
def test_rays_of_any_leading_shape(streams: bool) -> None:
    from streaming_cases import make_field

    field = make_field("native") if streams else Scene(False)
    origins, directions, appearance = (t.detach() for t in make_inputs())
    extras, shaped_extras = {}, {}
    if not streams:
        extras, shaped_extras = {"appearance": appearance}, {"appearance": appearance.view(1, 7, 7, 2)}
    background, light = torch.rand(49, 3, dtype=torch.float64), torch.rand(49, 3, dtype=torch.float64) + 2
    view = VolumeRenderer(field, config=RendererConfig(step=STEP))
    options = {} if not streams else {"shading": "lambertian"}
    flat = view.render(Rays(origins, directions), background, light=light, extras=extras, **options)
    shaped = view.render(
        Rays(origins, directions).reshape(1, 7, 7),
        background.view(1, 7, 7, 3),
        light=light.view(1, 7, 7, 3),
        extras=shaped_extras,
        **options,
    )
    assert shaped.color.shape == (1, 7, 7, 3)
    assert shaped.opacity.shape == shaped.depth.shape == shaped.expected_depth.shape == (1, 7, 7)
    assert torch.equal(shaped.color.view(49, 3), flat.color)
    assert torch.equal(shaped.depth.view(49), flat.depth)
    for name, value in flat.channels.items():
        assert torch.equal(shaped.channels[name].view(49, -1), value)
    with pytest.raises(ValueError, match=r"background: got shape \[49, 3\], want \[3\] or \[1, 7, 7, 3\]"):
        view.render(Rays(origins, directions).reshape(1, 7, 7), background, extras=shaped_extras)


def test_the_renderer_may_own_its_grid() -> None:
    def field(x: Tensor) -> tuple[Tensor, Tensor]:
        return 100.0 * (x.norm(dim=1) < 0.5), torch.ones_like(x)

    view = VolumeRenderer(field, config=RendererConfig(step=0.01), occupancy_resolution=16)
    assert view.occupancy.step_size == view.step_size == 0.01
    assert view.occupancy.resolution == 16
    assert "occupancy.bitfield" in view.state_dict()
    before = view.render(make_rays(5).to(dtype=torch.float32)).samples
    view.occupancy.update(field, 0)
    assert 0 < view.render(make_rays(5).to(dtype=torch.float32)).samples < 0.5 * before
    with pytest.raises(ValueError, match="occupancy_resolution: got 16 and a grid, want one of them"):
        VolumeRenderer(field, OccupancyGrid(), occupancy_resolution=16)


def test_a_cone_angle_may_begin_at_the_camera() -> None:
    rays = make_rays(5)
    outputs = [
        VolumeRenderer(lambda x: (0.3 * x.square().sum(dim=1), x.sigmoid()), config=config).render(rays)
        for config in (RendererConfig(step=0.002, cone_angle=0.005, near=0.0), RendererConfig(step=0.002))
    ]
    assert 0 < outputs[0].samples < 0.3 * outputs[1].samples
    torch.testing.assert_close(outputs[0].color, outputs[1].color, rtol=0, atol=1e-2)


def needing(*names: str) -> Callable[[Any], tuple[Tensor, Tensor]]:
    def field(samples: FieldSamples) -> tuple[Tensor, Tensor]:
        return samples.positions[:, 0].abs(), samples.directions.abs()

    field.needs = names
    return field


@pytest.mark.parametrize(
    ("field", "extras", "message"),
    [
        (needing("time"), None, "extras: got none, want 'time', which the field needs"),
        (needing("time"), {"look": torch.rand(9)}, "extras: got look, want 'time', which the field needs"),
        (
            needing("time"),
            {"time": torch.rand(8)},
            r"extras\['time'\]: got shape \[8\], want \[9, ...\], a row per ray",
        ),
        (needing("positions"), {"time": torch.rand(9)}, "extras: got time for a field that is given positions alone"),
        (lambda x: (x[:, 0], x), {"time": torch.rand(9)}, "extras: got time for a field that is given positions alone"),
    ],
)
def test_wrong_extras_are_named(field: Any, extras: dict[str, Tensor] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VolumeRenderer(field).render(make_rays(3), extras=extras)


def test_wrong_needs_and_extras_of_other_types_are_named() -> None:
    field = needing("time")
    with pytest.raises(TypeError, match=r"extras\['time'\]: got float, want a tensor \[n_rays, ...\]"):
        VolumeRenderer(field).render(make_rays(3), extras={"time": 0.5})
    with pytest.raises(TypeError, match=r"extras: got Tensor, want tensors \[n_rays, ...\] by name"):
        VolumeRenderer(field).render(make_rays(3), extras=torch.rand(9))
    with pytest.raises(ValueError, match=r"extras\['time'\]: is on meta, want cpu, where the rays are"):
        VolumeRenderer(field).render(make_rays(3), extras={"time": torch.rand(9, device="meta")})
    with pytest.raises(ValueError, match=r"light: is on meta, want cpu, where the rays are"):
        VolumeRenderer(lambda x: (x[:, 0], x)).render(
            make_rays(3), shading="lambertian", light=torch.ones(3, device="meta")
        )
    field.needs = "directions"
    with pytest.raises(TypeError, match=r"field\.needs: got 'directions', want a tuple of names"):
        VolumeRenderer(field)


def test_a_grid_cannot_know_directions() -> None:
    grid = OccupancyGrid(resolution=8)
    with pytest.raises(ValueError, match=r"samples\.directions: the field is asked at positions that lie on no rays"):
        grid.update(needing("directions"), 0)


def test_channels_that_change_between_chunks_are_named() -> None:
    calls = []

    def field(x: Tensor) -> FieldOutput:
        calls.append(0)
        return FieldOutput(x[:, 0].abs(), x, channels={f"c{min(len(calls), 2)}": x})

    with pytest.raises(ValueError, match=r"field: returned channels \{'c2': 3\}, and \{'c1': 3\} before"):
        VolumeRenderer(field, config=RendererConfig(max_samples_per_chunk=200)).render(make_rays(3))


@pytest.mark.parametrize("name", ["directions", "ray_indices", "t_starts", "t_ends"])
def test_what_positions_alone_do_not_know_is_named(name: str) -> None:
    samples = FieldSamples(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=rf"samples\.{name}: the field is asked at positions that lie on no rays"):
        getattr(samples, name)


def test_extras_can_be_asked_for_where_they_are_unknown() -> None:
    extras = FieldSamples(torch.zeros(2, 3)).extras
    assert "look" not in extras
    with pytest.raises(ValueError, match=r"samples\.extras\['look'\]: the field is asked at positions"):
        extras["look"]


def test_normals_in_inference_mode_of_a_field_that_saves_where_samples_begin() -> None:
    scale = nn.Parameter(torch.tensor(0.3))

    def field(samples: FieldSamples) -> tuple[Tensor, Tensor]:
        return samples.positions.square().sum(dim=1) * (samples.t_starts * scale), samples.positions.sigmoid()

    field.needs = ("positions", "t_starts")
    renderer, rays = VolumeRenderer(field, config=RendererConfig(step=STEP)), make_rays(3).to(dtype=torch.float32)
    with torch.inference_mode():
        output = renderer.render(rays, with_normals=True)
    torch.testing.assert_close(output.normal, renderer.render(rays, with_normals=True).normal.detach())


@pytest.mark.parametrize("pruning", [{"early_stop": 0.2}, {"alpha_threshold": 0.1}])
def test_opacities_prune_by_themselves_whatever_a_density_method_says(pruning: dict[str, float]) -> None:
    """Such a field has the method for an occupancy grid."""

    class WithDensity(Scene):
        def density(self, positions: Tensor) -> Tensor:
            return torch.full_like(positions[:, 0], 1e-3)

    extras = {"appearance": make_inputs()[2].detach()}
    config = RendererConfig(step=STEP, **pruning)
    wanted, actual = (
        VolumeRenderer(make(True), config=config).render(make_rays(), extras=extras) for make in (Scene, WithDensity)
    )
    everything = VolumeRenderer(Scene(True), config=RendererConfig(step=STEP)).render(make_rays(), extras=extras)
    assert actual.samples == wanted.samples < everything.samples
    assert torch.equal(actual.color, wanted.color)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"near": -1.0}, r"ray 0 has near -1\.0, want at least 0"),
        ({"near": math.nan}, "ray 0 has near nan"),
        ({"far": math.nan}, "ray 0 has a far that is not a number"),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
def test_limits_that_are_none_are_named(streams: bool, limits: dict[str, float], message: str) -> None:
    from streaming_cases import make_field

    field = make_field("native") if streams else (lambda x: (x.square().sum(dim=1), x.sigmoid()))
    rays = make_rays(3)
    with pytest.raises(InvalidRaysError, match=message):
        VolumeRenderer(field).render(Rays.from_tensors(rays.origins, rays.directions, **limits))


def test_a_single_ray() -> None:
    rays, renderer = make_rays(3), VolumeRenderer(lambda x: (x.square().sum(dim=1), x.sigmoid()))
    output, wanted = renderer.render(rays[4]), renderer.render(rays[4:5])
    for name in ("color", "opacity", "depth"):
        assert torch.equal(getattr(output, name), getattr(wanted, name)[0])


@pytest.mark.parametrize(
    ("colors", "error", "message"),
    [
        (lambda d: d[:, :1], ValueError, r"background: returned \[3, 1\] for 3 directions, want \[3, 3\]"),
        (lambda d: d[:2], ValueError, r"background: returned \[2, 3\] for 3 directions"),
        (lambda d: 0.5, TypeError, "background: returned float, want a tensor"),
    ],
)
def test_wrong_colours_of_a_called_background_are_named(
    colors: Callable[[Tensor], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        VolumeRenderer(lambda x: (x[:, 0].abs(), x)).render(make_rays(3)[:3], background=colors)
