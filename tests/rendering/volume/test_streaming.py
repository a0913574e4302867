"""The built-in field's own way to render: the same images and gradients as autograd in chunks, whatever the tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from dataclasses import field as member
from functools import partial
from typing import Any

import pytest
import torch
from streaming_cases import (
    EVERYTHING,
    LIGHT,
    LOSSES,
    PER_RAY,
    SMOOTH,
    STEP,
    assert_equal,
    differentiate,
    loss_of,
    make_field,
    make_occupancy,
    make_rays,
    relative_errors,
    render_with_gradients,
    smooth_scene,
    streamed,
)
from torch import Tensor
from torch.nn.functional import normalize

from dreamfusion_fast.fields import MlpBackground
from dreamfusion_fast.rendering import InvalidRaysError, OccupancyGrid, Rays, RendererConfig, VolumeRenderer


@dataclass(frozen=True)
class Case:
    """One render, by the settings in which it differs from the plainest."""

    name: str
    field: dict[str, Any] = member(default_factory=dict)
    config: dict[str, Any] = member(default_factory=dict)
    render: dict[str, Any] = member(default_factory=dict)
    occupied: float | None = None

    def view(self, backend: str, **config: Any) -> VolumeRenderer:
        source = make_field(backend, **self.field)
        occupancy = None if self.occupied is None else make_occupancy(self.occupied)
        settings = {"step": STEP, "backend": backend} | self.config | config
        return VolumeRenderer(source, occupancy, RendererConfig(**settings))


LIT = {"shading": "lambertian"}
ALL = {**LIT, **EVERYTHING}
LIGHTS = 3 * normalize(torch.randn(41, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64), dim=1)
CASES = [
    Case("albedo"),
    Case("lambertian", render=LIT),
    Case("textureless", render={"shading": "textureless"}),
    Case("normals", render={"with_normals": True}),
    Case("distortion", render={"with_distortion": True}),
    Case("entropy", render={"with_sample_entropy": True}),
    Case("all losses", render=ALL),
    Case("all losses of textureless", render=ALL | {"shading": "textureless"}),
    Case("jitter", render={"jitter": True, "seed": 7} | ALL),
    Case("occupancy", occupied=0.3, render=ALL),
    Case("occupancy and jitter", occupied=0.3, render={"jitter": True, "seed": 3}),
    Case("box", field={"bound": "box"}, render=ALL),
    Case("another box", field={"aabb": (-0.9, -0.4, -0.7, 0.5, 0.8, 1.1)}, render=ALL),
    Case("exp", field={"density_activation": "exp"}, render=ALL),
    Case("exp in a box", field={"density_activation": "exp", "bound": "box"}),
    Case("no blob", field={"blob_scale": 0.0, "bound": "box"}, render=ALL),
    Case("linear weights", field={"smoothstep": False}, render=ALL),
    Case("two hidden layers", field={"hidden_layers": 2}, render=ALL),
    Case("three hidden layers", field={"hidden_layers": 3, "hidden": 16}, render=ALL),
    Case("four features", field={"features": 4}, render=ALL),
    Case("one level", field={"levels": 1}),
    Case("a light per ray", render={**ALL, "light": LIGHTS}),
    Case("strengths", render={**LIT, "ambient": 0.4, "diffuse": 0.3}),
    Case("near and far", config={"near": 2.3, "far": 3.1}, render=ALL),
    Case("early stop", config={"early_stop": 0.3}, render=ALL),
    Case("early stop, occupancy and jitter", config={"early_stop": 0.1}, occupied=0.6, render={"jitter": True}),
    Case("channels", field={"channels": 5}, render=ALL),
    Case("channels and occupancy", field={"channels": 1}, occupied=0.6),
    Case("alpha threshold", config={"alpha_threshold": 0.001}, render=ALL),
    Case("alpha threshold and early stop", config={"alpha_threshold": 0.001, "early_stop": 0.05}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_autograd_in_chunks(case: Case) -> None:
    rays = make_rays()
    wanted = render_with_gradients(case.view("reference"), rays, **case.render)
    assert not streamed(wanted[0])
    for tile in (None, 113):
        given = render_with_gradients(case.view("native", max_samples_per_chunk=tile), rays, **case.render)
        assert streamed(given[0])
        assert_equal(given, wanted, 1e-10)
    # What is compared is there, and not zero.
    assert wanted[0].samples > 250
    for name, gradient in wanted[1].items():
        assert float(gradient.abs().max()) > 1e-4, name


def test_early_stop_changes_what_it_should() -> None:
    """Without the limit of light the comparison above would be one of two equal renders."""
    rays = make_rays()
    all_samples = Case("").view("native").render(rays)
    some = Case("", config={"early_stop": 0.3}).view("native").render(rays)
    assert 0 < some.samples < all_samples.samples - 100
    lost = (all_samples.opacity - some.opacity).detach()
    assert float(lost.amin()) > -1e-12
    assert 0.1 < float(lost.amax()) <= 0.3


@pytest.mark.parametrize("frozen", ["table", "layers", "all but one bias", "everything"])
def test_gradients_where_only_some_parameters_want_them(frozen: str) -> None:
    rays, view = make_rays(), Case("").view("native", max_samples_per_chunk=100)
    _, wanted = render_with_gradients(view, rays, **ALL)
    for name, parameter in view.field.named_parameters():
        parameter.requires_grad_(
            {
                "table": name != "table",
                "layers": name == "table",
                "all but one bias": name == "layers.0.bias",
                "everything": False,
            }[frozen]
        )
    output = view.render(rays, light=LIGHT, **ALL)
    wanting = {name: p for name, p in view.field.named_parameters() if p.requires_grad}
    assert output.color.requires_grad == bool(wanting)
    background = torch.rand(41, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    if wanting:
        loss = loss_of(replace(output, color=output.color + (1 - output.opacity)[:, None] * background))
        given = torch.autograd.grad(loss, list(wanting.values()))
        for (name, _), gradient in zip(wanting.items(), given, strict=True):
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-10, atol=1e-12)


def test_a_learned_background_gets_its_gradient() -> None:
    rays, background = make_rays(), MlpBackground().double()
    given, wanted = (
        differentiate(view, partial(view.render, rays, background), *background.parameters())
        for view in (Case("").view("native", max_samples_per_chunk=113), Case("").view("reference"))
    )
    assert_equal(given, wanted, 1e-10)
    assert float(given[1]["extra 0"].abs().max()) > 0


def test_strides_of_rays_and_parameters_do_not_matter() -> None:
    rays, view = make_rays(), Case("").view("native")
    wanted = render_with_gradients(view, rays, **ALL, light=LIGHTS)
    strided = Rays(rays.origins.t().contiguous().t(), rays.directions.repeat_interleave(2, dim=0)[::2])
    assert not strided.origins.is_contiguous()
    assert not strided.directions.is_contiguous()
    with torch.no_grad():
        for layer in view.field.layers:
            layer.weight.data = layer.weight.data.t().contiguous().t()
    given = render_with_gradients(view, strided, **ALL, light=LIGHTS.t().contiguous().t())
    assert_equal(given, wanted, 1e-12)


# Tiles.


@pytest.mark.parametrize("options", [{}, ALL], ids=["albedo", "all losses"])
def test_the_size_of_tiles_does_not_matter(options: dict[str, Any]) -> None:
    """With 1 and 7, rays of up to 50 samples lie in many tiles; with 64, most tiles begin and end inside a ray."""
    rays, case = make_rays(17), Case("", occupied=0.7, render=options)
    wanted = render_with_gradients(case.view("native"), rays, **options)
    assert wanted[0].samples > 300
    for tile in (1, 7, 64, 1000, 10**9):
        given = render_with_gradients(case.view("native", max_samples_per_chunk=tile), rays, **options)
        assert_equal(given, wanted, 1e-12)


def test_tiles_with_early_stop() -> None:
    """The density pass carries the optical depth from tile to tile, too."""
    rays, case = make_rays(17), Case("", config={"early_stop": 0.3})
    wanted = render_with_gradients(case.view("native"), rays, **ALL)
    for tile in (1, 7, 64):
        assert_equal(render_with_gradients(case.view("native", max_samples_per_chunk=tile), rays, **ALL), wanted, 1e-12)


@pytest.mark.parametrize("which", ["no rays", "one ray", "all miss", "empty grid", "one miss between hits"])
@pytest.mark.parametrize("tile", [None, 5])
def test_few_rays_and_few_samples(which: str, tile: int | None) -> None:
    hits = Rays(torch.tensor([[0.1, 0.2, 3.0], [0.3, -0.1, 3.0]]), torch.tensor([[0.0, 0.0, -1.0]] * 2))
    away = Rays(torch.tensor([[0.0, 0.0, 3.0]] * 3), torch.tensor([[0.0, 0.0, 1.0]] * 3))
    rays = {
        "no rays": hits[:0],
        "one ray": hits[:1],
        "all miss": away,
        "empty grid": hits,
        "one miss between hits": Rays(
            torch.cat([hits.origins[:1], away.origins[:1], hits.origins[1:]]),
            torch.cat([hits.directions[:1], away.directions[:1], hits.directions[1:]]),
        ),
    }[which].to(dtype=torch.float64)
    case = Case("", occupied=0.0 if which == "empty grid" else None)
    wanted = render_with_gradients(case.view("reference"), rays, **ALL)
    given = render_with_gradients(case.view("native", max_samples_per_chunk=tile), rays, **ALL)
    assert_equal(given, wanted, 1e-10)
    assert (given[0].samples > 0) == (which in ("one ray", "one miss between hits"))
    assert given[0].color.shape == (len(rays), 3)


def test_the_order_of_rays_does_not_matter() -> None:
    rays = make_rays()
    order = torch.randperm(len(rays), generator=torch.Generator().manual_seed(8))
    mix = torch.linspace(-1, 1, len(rays) * 8, dtype=torch.float64).view(-1, 8)
    results = []
    for chosen in (torch.arange(len(rays)), order):
        view = Case("", occupied=0.5).view("native", max_samples_per_chunk=113)
        options = ALL | {"light": LIGHTS[chosen]}
        output = view.render(rays[chosen], **options)
        values = torch.cat([output.color, output.opacity[:, None], output.depth[:, None], output.normal], dim=1)
        loss = (values * mix[chosen]).sum() + sum(getattr(output, name) for name in LOSSES)
        results.append((values.detach(), torch.autograd.grad(loss, list(view.field.parameters()))))
    torch.testing.assert_close(results[1][0], results[0][0][order], rtol=1e-12, atol=1e-13)
    for a, b in zip(results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * float(b.abs().max()))


# Numbers.


@pytest.mark.parametrize("options", [{}, LIT, ALL, EVERYTHING], ids=["albedo", "lambertian", "all", "albedo, all"])
def test_float32_keeps_its_digits(options: dict[str, Any]) -> None:
    """Some hundred rounding errors of 6e-8 in the sums over samples, of which the largest seen was 2e-6.

    The field is smooth and coarse: rounding a position moves it by a part of a cell that grows with the resolution,
    which says nothing of the renderer.
    """
    assert SMOOTH["finest_resolution"] <= 16
    given = render_with_gradients(*smooth_scene(torch.float32), **options)
    assert streamed(given[0])
    wanted = render_with_gradients(*smooth_scene(torch.float64), **options)
    errors = relative_errors(given, wanted)
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}


def _keep_away_from_kinks(source: torch.nn.Module, features: float) -> None:
    """Biases so large that no ReLU changes its mind, whatever features up to this size come in."""
    reach = torch.full((source.layers[0].weight.shape[1],), features, dtype=torch.float64)
    with torch.no_grad():
        for layer in source.layers[:-1]:
            swing = layer.weight.abs() @ reach
            signs = torch.ones_like(swing)
            signs[3::4] = -1  # one in four is off
            layer.bias.copy_(signs * (1.5 * swing + 0.1))
            reach = (layer.bias + swing).clamp(min=0)


@pytest.mark.parametrize("hidden_layers", [1, 2])
def test_finite_differences_of_the_whole_render(hidden_layers: int) -> None:
    """All but the orientation loss, which by its definition takes the weights as given, and differences do not.

    ReLUs stay away from their kinks, weights from the ends of the entropy's clamp, and tiles cut the rays.
    """
    source = make_field(
        levels=2, features=1, log2_rows=6, base_resolution=2, finest_resolution=3, hidden=4,
        hidden_layers=hidden_layers, bound="box", blob_scale=1.0,
    )  # fmt: skip
    _keep_away_from_kinks(source, 0.6)
    assert float(source.table.detach().abs().max()) < 0.51
    view = VolumeRenderer(source, config=RendererConfig(step=0.4, max_samples_per_chunk=5))
    rays = Rays(
        torch.tensor([[0.2, 0.1, 3.0], [2.0, 1.9, 2.1], [0.0, 0.0, 5.0]]),
        normalize(torch.tensor([[0.1, -0.2, -1.0], [-1.0, -1.1, -0.9], [0.0, 1.0, 0.0]])),
    ).to(dtype=torch.float64)
    names = [f"field.{name}" for name, _ in source.named_parameters()]

    def render(*parameters: Tensor) -> tuple[Tensor, ...]:
        output = torch.func.functional_call(view, dict(zip(names, parameters, strict=True)), (rays,), EVERYTHING)
        assert streamed(output)
        assert output.samples > 10
        return tuple(getattr(output, name) for name in (*PER_RAY, "distortion_loss", "sample_entropy_loss"))

    parameters = [parameter.detach().clone().requires_grad_() for parameter in source.parameters()]
    assert torch.autograd.gradcheck(render, parameters, eps=1e-6, atol=1e-8, rtol=1e-6)


# What it refuses.


def test_invalid_rays_are_named(device: torch.device) -> None:
    view = VolumeRenderer(make_field(dtype=torch.float32, hidden=16), config=RendererConfig(step=STEP)).to(device)
    for row, change, message in (
        (3, {"origins": float("nan")}, "ray 3 is not finite"),
        (40, {"directions": float("inf")}, "ray 40 is not finite"),
        (0, {"directions": 0.0}, "ray 0 has a direction of zero length"),
        (7, {"directions": 2.0}, "ray 7 has a direction that is not of unit length"),
    ):
        good = make_rays(dtype=torch.float32).to(device)
        ((name, value),) = change.items()
        bad = getattr(good, name).clone()
        bad[row] = value
        with pytest.raises(InvalidRaysError, match=message):
            view.render(replace(good, **{name: bad}))
        # And once the number of samples is expected, as well as before.
        view.render(good)
        with pytest.raises(InvalidRaysError, match=message):
            view.render(replace(good, **{name: bad}))


def test_bad_arguments_are_named() -> None:
    view, rays = Case("").view("native"), make_rays()
    with pytest.raises(ValueError, match=r"light: got None, want a position \[3\] or \[n_rays, 3\] for lambertian"):
        view.render(rays, shading="lambertian")
    with pytest.raises(ValueError, match=r"light: got shape \[40, 3\], want \[3\] or \[41, 3\]"):
        view.render(rays, shading="lambertian", light=LIGHTS[:40])
    with pytest.raises(ValueError, match=r"background: got shape \[41, 4\], want \[3\] or \[41, 3\]"):
        view.render(rays, torch.ones(41, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"RendererConfig\.memory_budget: got 0, want at least 1"):
        RendererConfig(memory_budget=0)
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=rf"seed: got {seed}, want 0 <= seed < 2\^63"):
            view.render(rays, jitter=True, seed=seed)
    with pytest.raises(ValueError, match="light: is on meta, want cpu, where the rays are"):
        view.render(rays, shading="lambertian", light=LIGHTS.to("meta"))


@pytest.mark.parametrize("what", ["field", "renderer", "occupancy"])
def test_another_device_than_the_rays_is_named(what: str) -> None:
    """The kernels are given addresses, which say nothing of the device."""
    if what == "renderer":  # its own is the box of a field without one
        view = VolumeRenderer(lambda x: (x[:, 0].exp(), x.sigmoid())).to("meta")
    else:
        view = VolumeRenderer(make_field(), OccupancyGrid(resolution=4))
        getattr(view, what).to("meta")
    with pytest.raises(ValueError, match=f"{what}: is on meta, want cpu, where the rays are"):
        view.render(make_rays())


@pytest.mark.parametrize("tensor", ["origins", "directions", "light"])
def test_what_wants_gradients_of_its_own_gets_them(tensor: str) -> None:
    """By autograd in chunks, which also gives the field the same gradients."""
    results = []
    for backend in ("native", "reference"):
        rays, light, view = make_rays(), LIGHTS.clone(), Case("").view(backend)
        chosen = light if tensor == "light" else getattr(rays, tensor)
        chosen.requires_grad_(True)
        render = partial(view.render, rays, light=light, **ALL)
        output, gradients = differentiate(view, render, chosen)
        assert not streamed(output)
        assert float(gradients["extra 0"].abs().max()) > 0
        results.append((output, gradients))
    assert_equal(*results, 1e-10)


def test_rays_of_another_dtype_than_the_field_are_refused() -> None:
    view = VolumeRenderer(make_field(dtype=torch.float32), config=RendererConfig(step=STEP))
    with pytest.raises((TypeError, ValueError), match="float64"):
        view.render(make_rays())


@pytest.mark.parametrize("what", ["table", "weight", "bias", "grid", "origins", "directions", "light"])
def test_a_change_between_forward_and_backward_is_an_error(what: str) -> None:
    view, rays, light = Case("", occupied=0.5).view("native", memory_budget=1), make_rays(), LIGHTS.clone()
    output = view.render(rays, light=light, **LIT)
    layer = view.field.layers[0]
    inputs = {"light": light, "table": view.field.table, "weight": layer.weight, "bias": layer.bias} | vars(rays)
    with torch.no_grad():
        if what == "grid":
            view.occupancy.set_occupied(torch.ones(8, 8, 8, dtype=torch.bool))
        else:
            inputs[what].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.color.sum().backward()


def test_a_second_derivative_is_an_error() -> None:
    view = Case("").view("native")
    loss = loss_of(view.render(make_rays())).square()  # whose first gradient depends on the render
    (gradient,) = torch.autograd.grad(loss, view.field.table, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()
