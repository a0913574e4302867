"""HashGridField: values, bounds, normals, gradients, coarse-to-fine levels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.fields import HashGridField, HashGridFieldConfig, truncated_exp

TINY = HashGridFieldConfig(
    levels=3, log2_rows=9, base_resolution=3, finest_resolution=11, hidden=8, backend="reference"
)


def make(config: HashGridFieldConfig = TINY, dtype: torch.dtype = torch.float64, scale: float = 0.5) -> HashGridField:
    """A field with a table large enough that the grid matters."""
    field = HashGridField(config, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        field.table.uniform_(-scale, scale, generator=torch.Generator().manual_seed(2))
    return field


def points(count: int, dtype: torch.dtype = torch.float64, half: float = 0.55) -> Tensor:
    return (2 * half) * (torch.rand(count, 3, generator=torch.Generator().manual_seed(3), dtype=dtype) - 0.5)


def zeroed(config: HashGridFieldConfig) -> HashGridField:
    """A field that is only its blob."""
    field = HashGridField(config).double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.zero_()
    return field


@pytest.mark.parametrize("count", [0, 1, 113])
def test_shapes_and_the_density_only_path(count: int) -> None:
    field = make()
    output = field(points(count))
    assert output.density.shape == (count,)
    assert output.color.shape == (count, 3)
    assert output.normal is None
    assert field(points(count), with_normal=True).normal.shape == (count, 3)
    torch.testing.assert_close(field.density(points(count)), output.density)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_non_contiguous_positions(backend: str) -> None:
    field = make(replace(TINY, backend=backend))
    x = points(113)
    strided = torch.cat([x, x], dim=1)[:, :3]
    assert not strided.is_contiguous()
    torch.testing.assert_close(field(strided).density, field(x).density)


@pytest.mark.parametrize(("bound", "corner_is_outside"), [("ball", True), ("box", False)])
def test_density_is_zero_outside_the_bound(bound: str, corner_is_outside: bool) -> None:
    field = make(replace(TINY, bound=bound, density_activation="exp"))
    x = torch.tensor([[0.9, 0.9, 0.9], [1.0001, 0, 0], [0, -7.0, 0], [0, 0, 0.99], [1e30, 0, 0]], dtype=torch.float64)
    output = field(x, with_normal=True)
    assert (output.density[0] == 0) == corner_is_outside
    assert output.density[1:3].tolist() == [0, 0]
    assert output.density[3] > 0
    assert output.density[4] == 0
    assert output.color.isfinite().all()
    assert output.normal is not None
    assert output.normal.isfinite().all()


def test_ball_follows_the_box() -> None:
    box = (0.0, 0.0, 0.0, 2.0, 4.0, 6.0)
    field = HashGridField(replace(TINY, density_activation="exp"), aabb=box)
    inside = torch.tensor([[1.0, 3.9, 3.0], [1.0, 2.0, 5.9], [1.9, 2.0, 3.0]])
    outside = torch.tensor([[1.9, 3.9, 5.9], [1.0, 2.0, 6.1]])
    assert (field.density(inside) > 0).all()
    assert (field.density(outside) == 0).all()


def test_blobs_are_those_of_the_papers() -> None:
    x = points(50)
    r = x.norm(dim=1)
    exp = zeroed(replace(TINY, density_activation="exp"))
    torch.testing.assert_close(exp.density(x), torch.exp(5 * torch.exp(-(r**2) / (2 * 0.2**2))))
    softplus = zeroed(replace(TINY, density_activation="softplus"))
    expected = torch.nn.functional.softplus(10 * (1 - r / 0.5))
    torch.testing.assert_close(softplus.density(x), expected, rtol=1e-6, atol=0)
    flat = zeroed(replace(TINY, density_activation="exp", blob_scale=0.0))
    torch.testing.assert_close(flat.density(x), torch.ones_like(r))


def test_the_bias_makes_a_scene_start_thin() -> None:
    """And nothing else: the other parameters, and those without it, are what they were."""
    thin = replace(TINY, density_activation="exp", blob_scale=0.0, bound="box", density_bias=-4.0)
    field, plain = (HashGridField(c, generator=torch.Generator().manual_seed(1)) for c in (thin, TINY))
    density = field.density(points(113, torch.float32, half=1.0))
    torch.testing.assert_close(density, torch.full_like(density, math.exp(-4.0)), rtol=1e-3, atol=0)
    for (name, one), other in zip(field.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other) == (name != "layers.1.bias")
    assert (plain.layers[1].bias == 0.0).all()


def test_blob_normals_point_outward() -> None:
    x = points(50)
    for activation in ("exp", "softplus"):
        normal = zeroed(replace(TINY, density_activation=activation))(x, with_normal=True).normal
        torch.testing.assert_close(normal, x / x.norm(dim=1, keepdim=True), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ["exp", "softplus"])
@pytest.mark.parametrize("smoothstep", [False, True])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_normals_against_central_differences_of_the_density(activation: str, smoothstep: bool, backend: str) -> None:
    config = replace(TINY, density_activation=activation, smoothstep=smoothstep, backend=backend)
    field, x, eps = make(config), points(113), 1e-6
    shifts = eps * torch.eye(3, dtype=torch.float64)
    gradient = torch.stack([field.density(x + s) - field.density(x - s) for s in shifts], dim=1) / (2 * eps)
    expected = -gradient / gradient.norm(dim=1, keepdim=True)
    normal = field(x, with_normal=True).normal
    torch.testing.assert_close(normal, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_gradients_through_normals(backend: str) -> None:
    """Finite differences on the parameters of a loss that reads density, albedo and normals."""
    field, x = make(replace(TINY, backend=backend, smoothstep=True)), points(5)
    names, values = zip(*field.named_parameters(), strict=True)
    mix = torch.randn(5, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def loss(*parameters: Tensor) -> Tensor:
        output = torch.func.functional_call(field, dict(zip(names, parameters, strict=True)), (x, True))
        stacked = torch.cat([output.density[:, None], output.color, output.normal], dim=1)
        return (stacked * mix).sum()

    inputs = tuple(v.detach().clone().requires_grad_(True) for v in values)
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize("with_normal", [False, True])
def test_native_and_reference_agree(device: torch.device, with_normal: bool) -> None:
    results = []
    for backend in ("native", "reference"):
        field = make(replace(TINY, backend=backend), torch.float32).to(device)
        output = field(points(1023, torch.float32).to(device), with_normal=with_normal)
        loss = output.density.sum() + output.color.square().sum()
        if with_normal:
            loss = loss + (output.normal[:, 0] * output.density).sum()
        loss.backward()
        results.append([output.density, output.color, *(p.grad for p in field.parameters())])
    for native, reference in zip(*results, strict=True):
        torch.testing.assert_close(native, reference, rtol=2e-4, atol=2e-5 * float(reference.detach().abs().max()))


def test_normals_are_finite_where_the_density_is_flat() -> None:
    field = zeroed(replace(TINY, blob_scale=0.0))
    output = field(points(10), with_normal=True)
    assert output.normal is not None
    assert (output.normal == 0).all()
    (output.normal.sum() + output.density.sum()).backward()
    assert all(p.grad.isfinite().all() for p in field.parameters() if p.grad is not None)


@pytest.mark.parametrize("activation", ["exp", "softplus"])
def test_the_centre_is_no_singularity(activation: str) -> None:
    field = make(replace(TINY, density_activation=activation))
    output = field(torch.zeros(1, 3, dtype=torch.float64), with_normal=True)
    assert output.normal is not None
    (output.normal.sum() + output.density.sum()).backward()
    assert output.normal.isfinite().all()
    assert all(p.grad.isfinite().all() for p in field.parameters())


@pytest.mark.parametrize("with_normal", [False, True])
def test_without_gradients_nothing_is_recorded(with_normal: bool) -> None:
    field = make()
    with torch.no_grad():
        output = field(points(5), with_normal=with_normal)
    assert not any(t.requires_grad for t in (output.density, output.color))
    torch.testing.assert_close(output.density, field(points(5)).density)


def test_generator_makes_the_parameters_reproducible() -> None:
    first, second = (HashGridField(TINY, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    other = HashGridField(TINY, generator=torch.Generator().manual_seed(8))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.table, other.table)


def test_state_dict_round_trip() -> None:
    source, target = make(), HashGridField(TINY).double()
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target.density(points(9)), source.density(points(9)))


@pytest.mark.parametrize("with_normal", [False, True])
def test_bfloat16_products_stay_close(with_normal: bool) -> None:
    exact = make(dtype=torch.float32)(points(113, torch.float32), with_normal)
    rounded = make(replace(TINY, mlp_dtype="bfloat16"), torch.float32)(points(113, torch.float32), with_normal)
    assert rounded.density.dtype == torch.float32
    # bfloat16 keeps 8 bits; three products of magnitude about 1 add up to a few of its roundings.
    torch.testing.assert_close(rounded.color, exact.color, rtol=0, atol=4 * 2**-8)
    if with_normal:
        assert ((rounded.normal * exact.normal).sum(dim=1) > 0.99).all()


def test_truncated_exp() -> None:
    x = torch.tensor([-3.0, 0.0, 14.0, 16.0, 1e6], dtype=torch.float64, requires_grad=True)
    y = truncated_exp(x)
    torch.testing.assert_close(y, x.detach().clamp(max=15).exp())
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, y.detach())
    small = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(truncated_exp, small)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": 0}, r"levels: got 0"),
        ({"hidden_layers": 0}, r"hidden_layers: got 0"),
        ({"finest_resolution": 2}, r"finest_resolution: got 2, want at least base_resolution = 3"),
        ({"density_activation": "relu"}, r"density_activation: got 'relu'"),
        ({"bound": "cone"}, r"bound: got 'cone'"),
        ({"mlp_dtype": "int8"}, r"mlp_dtype: got 'int8'"),
        ({"backend": "magic"}, r"backend: got 'magic', want one of native, reference"),
        ({"blob_std": 0.0}, r"blob_std: got 0.0, want above 0"),
    ],
)
def test_bad_settings_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_bad_positions_are_named() -> None:
    field = make()
    with pytest.raises(ValueError, match=r"positions: got shape \[3\], want \[m, 3\]"):
        field(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"positions: got torch.int64"):
        field.density(torch.zeros(2, 3, dtype=torch.int64))


def test_bad_box_is_named() -> None:
    with pytest.raises(ValueError, match=r"aabb: got \[0.0, 0.0, 0.0, 1.0, 1.0, 0.0\]"):
        HashGridField(TINY, aabb=(0, 0, 0, 1, 1, 0))


@pytest.mark.parametrize("activation", ["softplus", "exp"])
def test_the_twin_takes_part_in_transforms_of_torch_func(activation: str) -> None:
    field = make(replace(TINY, density_activation=activation, backend="reference"))
    positions = 0.4 * torch.rand(7, 3, dtype=torch.float64)

    def density(parameters: dict[str, Tensor], position: Tensor) -> Tensor:
        return torch.func.functional_call(field, parameters, (position[None],)).density[0]

    parameters = dict(field.named_parameters())
    plain = {name: parameter.detach() for name, parameter in parameters.items()}
    rows = torch.vmap(torch.func.grad(density), in_dims=(None, 0))(plain, positions)
    expected = torch.autograd.grad(field(positions).density.sum(), parameters.values(), materialize_grads=True)
    for name, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(rows[name].sum(dim=0), gradient, rtol=1e-10, atol=1e-12)
