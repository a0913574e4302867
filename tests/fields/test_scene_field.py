"""SceneField: values, box and contraction, directions, normals, gradients."""

from __future__ import annotations

import doctest
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.fields import FieldSamples, SceneField, SceneFieldConfig, contract, query_density, scene_field
from dreamfusion_fast.rendering import OccupancyGrid, RendererConfig, VolumeRenderer, orbit_cameras

TINY = SceneFieldConfig(
    levels=3, log2_rows=9, base_resolution=3, finest_resolution=11, hidden=8, geometry_features=5, view_degree=3
)
PLAIN = replace(TINY, view_degree=0)
BOX = (-1.0, -2.0, 0.0, 3.0, 1.0, 2.5)


def make(config: SceneFieldConfig = TINY, dtype: torch.dtype = torch.float64, aabb=BOX) -> SceneField:
    """A field with a table large enough that the grid matters."""
    field = SceneField(config, aabb, torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        field.table.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(2))
    return field


def samples(count: int, dtype: torch.dtype = torch.float64, spread: float = 1.0) -> FieldSamples:
    """In the box, or with a spread above 1 also around it."""
    generator = torch.Generator().manual_seed(3)
    draws = 2 * torch.rand(count, 3, generator=generator, dtype=torch.float64) - 1
    low, high = torch.tensor(BOX, dtype=torch.float64).view(2, 3)
    directions = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator, dtype=torch.float64), dim=1)
    return along((0.5 * (low + high) + 0.5 * (high - low) * spread * draws).to(dtype), directions.to(dtype))


def along(positions: Tensor, directions: Tensor) -> FieldSamples:
    """Samples of which each lies on a ray of its own."""
    return FieldSamples(positions, directions, torch.arange(len(positions)))


@pytest.mark.parametrize("count", [0, 1, 113])
@pytest.mark.parametrize("config", [TINY, PLAIN, replace(TINY, contraction="sphere")])
def test_shapes_and_the_density_only_path(config: SceneFieldConfig, count: int) -> None:
    field, given = make(config), samples(count)
    asked = given if config.view_degree else given.positions
    output = field(asked)
    assert output.density.shape == (count,)
    assert output.color.shape == (count, 3)
    assert output.normal is None
    assert field(asked, with_normal=True).normal.shape == (count, 3)
    assert torch.equal(field.density(given.positions), output.density)
    assert torch.equal(query_density(field, given.positions), output.density)


@pytest.mark.parametrize("config", [TINY, replace(TINY, contraction="sphere")])
def test_backends_agree(config: SceneFieldConfig) -> None:
    native, twin = make(config), make(replace(config, backend="reference"))
    given = samples(113, spread=2.0)
    one, other = native(given, with_normal=True), twin(given, with_normal=True)
    for name in ("density", "color", "normal"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-12, atol=1e-13)


def test_it_says_what_it_needs() -> None:
    assert make().needs == ("positions", "directions")
    assert make(PLAIN).needs == ("positions",)


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_colours_depend_on_the_direction_and_densities_do_not(degree: int) -> None:
    field, given = make(replace(TINY, view_degree=degree)), samples(113)
    turned = along(given.positions, given.directions.roll(1, dims=0))
    one, other = field(given, with_normal=True), field(turned, with_normal=True)
    assert torch.equal(one.density, other.density)
    assert torch.equal(one.normal, other.normal)
    # The one function of the first band is constant.
    assert torch.equal(one.color, other.color) == (degree == 1)
    assert (one.color > 0).all()
    assert (one.color < 1).all()


@pytest.mark.parametrize("activation", ["exp", "softplus"])
@pytest.mark.parametrize("bias", [-7.0, -1.0, 2.0])
def test_the_bias_is_the_initial_density(activation: str, bias: float) -> None:
    field = SceneField(replace(PLAIN, density_bias=bias, density_activation=activation))
    wanted = math.exp(bias) if activation == "exp" else math.log1p(math.exp(bias))
    density = field.density(2 * torch.rand(113, 3) - 1)
    torch.testing.assert_close(density, torch.full_like(density, wanted), rtol=1e-3, atol=0)


def test_density_is_zero_outside_the_box_alone() -> None:
    field = make(PLAIN)
    x = torch.tensor([[2.99, 0.99, 2.49], [3.01, 0, 1], [0, -2.01, 1], [0, 0, -0.01], [-0.99, -1.99, 0.01]]).double()
    assert (field.density(x) > 0).tolist() == [True, False, False, False, True]


def test_contracted_density_is_everywhere_and_looked_up_where_it_is_contracted() -> None:
    field, plain = make(replace(PLAIN, contraction="sphere")), make(PLAIN)
    x = samples(113, spread=40.0).positions
    low, high = (torch.tensor(half, dtype=torch.float64) for half in (BOX[:3], BOX[3:]))
    centre, half = 0.5 * (low + high), 0.5 * (high - low)
    inside = centre + half * 0.5 * contract((x - centre) / half)
    torch.testing.assert_close(field.density(x), plain.density(inside), rtol=1e-11, atol=0)
    far = field(torch.tensor([[1e10, 0.0, 0.0], [0.0, -1e300, 1e250]], dtype=torch.float64), with_normal=True)
    assert (far.density > 0).all()
    assert all(value.isfinite().all() for value in (far.density, far.color, far.normal))


@pytest.mark.parametrize("activation", ["exp", "softplus"])
@pytest.mark.parametrize("contraction", ["none", "sphere"])
def test_normals_are_those_of_the_density(activation: str, contraction: str) -> None:
    config = replace(TINY, density_activation=activation, contraction=contraction, smoothstep=True)
    field, given = make(config), samples(113, spread=0.95 if contraction == "none" else 3.0)
    points = given.positions.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(field.density(points).sum(), points)
    wanted = -torch.nn.functional.normalize(gradient, dim=1)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            output = field(given, with_normal=True)
        torch.testing.assert_close(output.normal.detach(), wanted, rtol=0, atol=1e-9)
        assert output.density.requires_grad == output.color.requires_grad == output.normal.requires_grad
        assert output.normal.requires_grad == (mode is torch.enable_grad)


@pytest.mark.parametrize("contraction", ["none", "sphere"])
def test_gradients_to_parameters_positions_and_directions(contraction: str) -> None:
    config = replace(TINY, contraction=contraction, backend="reference", smoothstep=True)
    field, given = make(config), samples(3, spread=0.9 if contraction == "none" else 3.0)
    names = [name for name, _ in field.named_parameters()]

    def values(positions: Tensor, directions: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(names, parameters, strict=True))
        output = torch.func.functional_call(field, named, (along(positions, directions), True))
        return output.density, output.color, output.normal

    inputs = [given.positions, given.directions, *(p.detach().clone() for p in field.parameters())]
    assert torch.autograd.gradcheck(values, [value.requires_grad_() for value in inputs], fast_mode=True)


def test_every_parameter_is_in_one_group_and_gets_a_gradient() -> None:
    field = make()
    groups = field.parameter_groups()
    assert set(groups) == {"table", "mlp"}
    grouped = [id(parameter) for group in groups.values() for parameter in group]
    assert sorted(grouped) == sorted(id(parameter) for parameter in field.parameters())
    output = field(samples(113))
    (output.density.sum() + output.color.sum()).backward()
    assert all(bool(parameter.grad.abs().max() > 0) for parameter in field.parameters())


def test_a_generator_decides_the_initial_parameters() -> None:
    one, same, other = (SceneField(TINY, BOX, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    for a, b in zip(one.state_dict().values(), same.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.table, other.table)
    assert isinstance(TINY.build(BOX), SceneField)


@pytest.mark.parametrize("view_degree", [0, 3])
def test_rendering_learns_a_thin_scene(view_degree: int) -> None:
    """Through renderer and occupancy grid: its density starts low and becomes opaque."""
    field = make(replace(TINY, density_bias=-3.0, view_degree=view_degree), torch.float32, aabb=None)
    occupancy = OccupancyGrid(resolution=8)
    renderer = VolumeRenderer(field, occupancy, RendererConfig(samples_across=40))
    optimizer = torch.optim.Adam(renderer.parameters(), lr=3e-2)
    rays = orbit_cameras(2).rays(6, 6)
    target = torch.tensor([0.1, 0.6, 0.2])
    losses = []
    for step in range(40):
        occupancy.update(field, step)
        loss = (renderer.render(rays, jitter=True, seed=step).color - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]


def test_bad_arguments_are_named() -> None:
    given = samples(4)
    with pytest.raises(TypeError, match=r"^samples: got Tensor, want FieldSamples, or a field with view_degree 0"):
        make()(given.positions)
    with pytest.raises(TypeError, match=r"^positions: got FieldSamples, want a floating-point tensor"):
        make(PLAIN)(given)
    with pytest.raises(TypeError, match=r"^positions: got torch.float32, want torch.float64, the field's"):
        make()(samples(4, torch.float32))
    with pytest.raises(ValueError, match=r"^positions: got shape \[4, 2\]"):
        make().density(given.positions[:, :2])
    with pytest.raises(TypeError, match=r"^SceneField: got torch.float16 for its parameters, want"):
        make().half()
    with pytest.raises(ValueError, match="finest_resolution: got 2, want at least base_resolution = 3"):
        replace(TINY, finest_resolution=2)
    with pytest.raises(ValueError, match="view_degree: got 5, want 0 to 4"):
        replace(TINY, view_degree=5)


def test_docstring_examples() -> None:
    assert doctest.testmod(scene_field, raise_on_error=False).failed == 0
