"""TriplaneField: values, normals, gradients, planes of a network, several scenes, and that it streams."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.fields import FieldSamples, TriplaneField, TriplaneFieldConfig, query_density
from dreamfusion_fast.ops import triplane_reference
from dreamfusion_fast.rendering import OccupancyGrid, Rays, RendererConfig, VolumeRenderer, orbit_cameras

TINY = TriplaneFieldConfig(resolution=9, features=4, hidden=8, backend="reference")
both_degrees = pytest.mark.parametrize("degree", [1, 2])
both_backends = pytest.mark.parametrize("backend", ["native", "reference"])


def make(config: TriplaneFieldConfig = TINY, dtype: torch.dtype = torch.float64, scale: float = 0.5) -> TriplaneField:
    """A field with planes large enough that they matter."""
    field = TriplaneField(config, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        field.planes.uniform_(-scale, scale, generator=torch.Generator().manual_seed(2))
    return field


def points(count: int, dtype: torch.dtype = torch.float64, half: float = 0.55) -> Tensor:
    return (2 * half) * (torch.rand(count, 3, generator=torch.Generator().manual_seed(3), dtype=dtype) - 0.5)


def some_rays(dtype: torch.dtype = torch.float64, size: int = 13) -> Rays:
    return orbit_cameras(3, elevation_deg=15.0).rays(size, size).to(dtype=dtype)


@pytest.mark.parametrize("count", [0, 1, 113])
def test_shapes_and_the_density_only_path(count: int) -> None:
    field = make(replace(TINY, channels=2))
    output = field(points(count), with_normal=True)
    assert output.density.shape == (count,)
    assert output.color.shape == output.normal.shape == (count, 3)
    assert output.channels["features"].shape == (count, 2)
    torch.testing.assert_close(field.density(points(count)), output.density)


@both_degrees
def test_features_are_concatenated(degree: int) -> None:
    """(x, y), then (x, z), then (y, z), which a checkpoint's first layer goes by."""
    field, x = make(replace(TINY, degree=degree, blob_scale=0.0, bound="box")), points(113)
    features = triplane_reference(0.5 * (x + 1.0), field.planes, None, degree)
    hidden = torch.relu(torch.nn.functional.linear(features, field.layers[0].weight, field.layers[0].bias))
    logits = torch.nn.functional.linear(hidden, field.layers[1].weight, field.layers[1].bias)
    output = field(x)
    torch.testing.assert_close(output.density, torch.nn.functional.softplus(logits[:, 0]))
    torch.testing.assert_close(output.color, torch.sigmoid(logits[:, 1:]))


@pytest.mark.parametrize("activation", ["exp", "softplus"])
@both_degrees
@both_backends
def test_normals_against_central_differences_of_the_density(activation: str, degree: int, backend: str) -> None:
    config = replace(TINY, density_activation=activation, degree=degree, backend=backend)
    field, x, eps = make(config), points(113), 1e-6
    shifts = eps * torch.eye(3, dtype=torch.float64)
    gradient = torch.stack([field.density(x + s) - field.density(x - s) for s in shifts], dim=1) / (2 * eps)
    expected = -gradient / gradient.norm(dim=1, keepdim=True)
    torch.testing.assert_close(field(x, with_normal=True).normal, expected, rtol=0, atol=1e-5)


@both_backends
def test_gradients_through_normals(backend: str) -> None:
    """Finite differences on the parameters of a loss that reads density, albedo and normals."""
    field, x = make(replace(TINY, backend=backend)), points(5)
    names, values = zip(*field.named_parameters(), strict=True)
    mix = torch.randn(5, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def loss(*parameters: Tensor) -> Tensor:
        output = torch.func.functional_call(field, dict(zip(names, parameters, strict=True)), (x, True))
        stacked = torch.cat([output.density[:, None], output.color, output.normal], dim=1)
        return (stacked * mix).sum()

    inputs = tuple(v.detach().clone().requires_grad_(True) for v in values)
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True)


def test_parameters_by_their_kinds_and_reproducible() -> None:
    first, second = (TriplaneField(TINY, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    groups = first.parameter_groups()
    assert list(groups) == ["planes", "mlp"]
    assert {id(p) for group in groups.values() for p in group} == {id(p) for p in first.parameters()}
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.planes.abs().max() <= 1e-4
    target = make(scale=0.1)
    target.load_state_dict(make().state_dict())
    assert torch.equal(target.planes, make().planes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"TriplaneField: got torch.*TriplaneFieldConfig.mlp_dtype is the setting"):
        make().to(dtype)


def outcome(field: TriplaneField, backend: str, tile: int | None, **options: object) -> list[Tensor]:
    """A render of a batch of rays, and the gradients of all parameters."""
    device = field.planes.device
    config = RendererConfig(samples_across=64, backend=backend, max_samples_per_chunk=tile)  # type: ignore[arg-type]
    renderer = VolumeRenderer(field, None, config).to(device)
    rays = some_rays(field.planes.dtype).to(device)
    light = torch.tensor([1.0, 2.0, 3.0], dtype=field.planes.dtype, device=device)
    output = renderer.render(rays, None, "lambertian", light, True, 3, with_distortion=True, **options)  # type: ignore[arg-type]
    loss = output.color.square().sum() + output.depth.sum() + output.orientation_loss + output.distortion_loss
    wanted = [p for p in (field.planes, *field.layers.parameters()) if p.requires_grad]
    return [output.color, output.opacity, output.depth, output.normal, *torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize("tile", [None, 1111])
@pytest.mark.parametrize("scenes", [1, 3])
@both_degrees
def test_it_streams(degree: int, scenes: int, tile: int | None, device: torch.device) -> None:
    """All tiles at once, and some that end within a ray and are recomputed, as autograd has it in one piece."""
    config = replace(TINY, degree=degree, scenes=scenes, features=5, backend="native")
    extras = {"scene": (torch.arange(3 * 13 * 13, device=device) // 60) % scenes} if scenes > 1 else None
    field = make(config).to(device)
    assert field.tile_source() is not None
    actual = outcome(field, "native", tile, extras=extras)
    expected = outcome(field, "reference", None, extras=extras)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11 * max(1.0, float(e.detach().abs().max())))


@pytest.mark.gpu
@pytest.mark.parametrize("scenes", [1, 2])
def test_half_precision_on_a_gpu(scenes: int) -> None:
    device = torch.device("cuda")
    config = replace(TINY, hidden=32, features=8, scenes=scenes, backend="native")
    extras = {"scene": torch.arange(3 * 13 * 13, device=device) % scenes} if scenes > 1 else None
    exact = outcome(make(config, torch.float32).to(device), "native", None, extras=extras)
    half = outcome(make(replace(config, mlp_dtype="auto"), torch.float32).to(device), "native", None, extras=extras)
    for a, e in zip(half, exact, strict=True):
        assert (a - e).norm() <= 0.02 * e.norm()


def test_scenes_in_one_render_are_those_of_one_each() -> None:
    field = make(replace(TINY, scenes=2, backend="native"))
    rays = some_rays()
    scene = torch.arange(len(rays)) % 2
    together = VolumeRenderer(field, None).render(rays, extras={"scene": scene}).color
    for number in range(2):
        alone = VolumeRenderer(field.of_scene(number), None).render(rays).color
        torch.testing.assert_close(together[scene == number], alone[scene == number])


def test_an_occupancy_grid_holds_all_scenes() -> None:
    field, x = make(replace(TINY, scenes=3, backend="native")), points(113)
    alone = torch.stack([query_density(field.of_scene(number), x) for number in range(3)])
    torch.testing.assert_close(query_density(field, x), alone.max(dim=0).values)
    grid = OccupancyGrid(field.aabb, resolution=8)
    grid.update(field.float(), step=0)
    assert grid.occupied().any()


@both_backends
def test_planes_of_a_network_get_gradients_and_the_mlp_is_shared(backend: str) -> None:
    field = make(replace(TINY, backend=backend))
    source = torch.randn(2, 3, 7, 11, 4, dtype=torch.float64, requires_grad=True)
    made = field.with_planes(0.5 * source)
    assert made.needs == ("positions", "scene")
    assert list(made.parameter_groups()) == ["mlp"]
    assert made.layers is field.layers
    assert field.planes.shape[0] == 1
    assert isinstance(field.planes, torch.nn.Parameter)
    renderer = VolumeRenderer(made, None, RendererConfig(samples_across=32))
    rays = some_rays()
    output = renderer.render(rays, extras={"scene": torch.arange(len(rays)) % 2})
    output.color.square().sum().backward()
    assert source.grad is not None
    assert (source.grad.abs().amax(dim=(2, 3)) > 0).all()
    assert field.planes.grad is None
    assert field.layers[0].weight.grad is not None
    torch.testing.assert_close(
        made.of_scene(1).density(points(9)), field.with_planes(made.planes[1:]).density(points(9))
    )
    assert "planes" not in made.state_dict()
    assert torch.equal(copy.deepcopy(field.with_planes(source.detach())).planes, source)


@pytest.mark.parametrize(
    ("planes", "error", "message"),
    [
        (None, TypeError, "planes: got NoneType, want torch.float64, the field's"),
        (torch.zeros(1, 3, 9, 9, 4), TypeError, "planes: got torch.float32, want torch.float64"),
        (torch.zeros(1, 3, 9, 9, 5).double(), ValueError, r"want \[n_scenes, 3, height, width, 4\]"),
        (torch.zeros(1, 3, 2, 9, 4).double(), ValueError, r"3 to 2\^14 vertices a side"),
    ],
)
def test_wrong_planes(planes: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make().with_planes(planes)


@pytest.mark.parametrize(
    ("scene", "error", "message"),
    [
        (None, ValueError, "extras: got none, want 'scene', which the field needs"),
        (torch.zeros(507), TypeError, r"extras\['scene'\]: got torch.float32, want integers"),
        (torch.zeros(507, 1, dtype=torch.int32), ValueError, r"extras\['scene'\]: got shape \[507, 1\], want \[507\]"),
        (torch.full((507,), 2), ValueError, r"extras\['scene'\]: got 2 to 2, want 0 to 1"),
        (torch.full((507,), 2**32), ValueError, r"extras\['scene'\]: got 4294967296 to 4294967296, want 0 to 1"),
    ],
)
def test_wrong_scenes(scene: Tensor | None, error: type[Exception], message: str) -> None:
    renderer = VolumeRenderer(make(replace(TINY, scenes=2, backend="native")), None)
    with pytest.raises(error, match=message):
        renderer.render(some_rays(), extras=None if scene is None else {"scene": scene})


def test_scenes_that_are_not_there_and_positions_alone() -> None:
    field = make(replace(TINY, scenes=2))
    with pytest.raises(ValueError, match="scene: got 2, want 0 to 1"):
        field.of_scene(2)
    with pytest.raises(TypeError, match="positions: got Tensor, want FieldSamples, or a field of one scene"):
        field(points(3))
    with pytest.raises(ValueError, match=r"samples.extras\['scene'\]: the field is asked at positions"):
        field(FieldSamples(points(3)))


def test_a_subclass_that_asks_for_more_is_called() -> None:
    class Directed(TriplaneField):
        needs = ("positions", "directions")

        def forward(self, samples: FieldSamples, with_normal: bool = False) -> object:  # type: ignore[override]
            assert samples.directions.shape == samples.positions.shape
            return super().forward(samples.positions, with_normal)

        def _set_needs(self) -> None:
            pass

    field = Directed(replace(TINY, backend="native"), generator=torch.Generator().manual_seed(1))
    plain = TriplaneField(replace(TINY, backend="native"), generator=torch.Generator().manual_seed(1))
    rays = some_rays(torch.float32)
    colors = [VolumeRenderer(x, None).render(rays).color for x in (field, plain)]
    torch.testing.assert_close(*colors)
