"""Chunks that are recomputed in backward give all gradients of a render in one chunk, and hold no activations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from dreamfusion_fast.rendering import Rays, RendererConfig, VolumeRenderer, orbit_cameras

LIGHT = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
ONE = 10**9
CHUNKS = [211, 97, 1]

Function = Callable[[Tensor], tuple[Tensor, Tensor]]
# A new field, and what gradients are asked for.
Case = Callable[[], tuple[Function, list[Tensor]]]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_(True)


def make_rays(size: int = 5) -> Rays:
    rays = orbit_cameras(1, elevation_deg=20, start_deg=30).rays(size, size).to(dtype=torch.float64)
    return Rays.normalized(rays.origins, rays.directions)[0]


def blob(positions: Tensor) -> Tensor:
    return 9 * torch.sigmoid(9 * (0.6 - positions.norm(dim=1)))


def network(positions: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """A little MLP: weights `[3, h]`, `[h, 4]`."""
    out = torch.tanh(positions @ first) @ second
    return blob(positions) * torch.exp(out[:, 0]), torch.sigmoid(out[:, 1:])


def leaf_read_in_places() -> tuple[Function, list[Tensor]]:
    inner, outer = numbers(3), numbers(3, seed=1)

    def field(positions: Tensor) -> tuple[Tensor, Tensor]:
        color = inner.expand(positions.shape[0], 3).clone()
        far = positions[:, 1] > 0.4
        if far.any():
            color[far] = outer
        return blob(positions), color

    return field, [inner, outer]


def parameter_of_another_module() -> tuple[Function, list[Tensor]]:
    """Read only where the field is asked for more than a few positions."""
    own, elsewhere = nn.Parameter(numbers(1).detach()), [nn.Parameter(numbers(1, seed=1).detach())]

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = own

        def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
            near = (positions.norm(dim=1) < 0.7)[:, None]
            color = self.own.expand(positions.shape[0], 3)
            return blob(positions), torch.where(near, color * elsewhere[0], color) if near.any() else color

    return Reads(), [own, *elsewhere]


def weights_from_a_network() -> tuple[Function, list[Tensor]]:
    code, hyper = numbers(5), nn.Linear(5, 3 * 6 + 6 * 4).double()
    with torch.no_grad():
        hyper.weight.copy_(0.4 * numbers(42, 5, seed=1))
        hyper.bias.zero_()
    weights = hyper(code).tanh()
    return lambda x: network(x, weights[:18].view(3, 6), weights[18:].view(6, 4)), [code, *hyper.parameters()]


def leaf_and_what_is_made_of_it() -> tuple[Function, list[Tensor]]:
    first, second = numbers(3, 6), numbers(6, 4, seed=1)
    scaled = (2 * second).tanh()
    return lambda x: network(x, first, second * scaled), [first, second]


def function_with_gradient() -> tuple[Function, list[Tensor]]:
    """A tensor of the caller's graph that only an autograd.Function sees."""

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, scale):
            ctx.save_for_backward(x, scale)
            return x * scale

        @staticmethod
        def backward(ctx, grad):
            x, scale = ctx.saved_tensors
            return grad * scale, (grad * x).sum()

    leaf = numbers()
    scale = leaf.exp()
    return lambda x: (Scale.apply(blob(x), scale), torch.sigmoid(x)), [leaf]


CASES = [
    leaf_read_in_places,
    parameter_of_another_module,
    weights_from_a_network,
    leaf_and_what_is_made_of_it,
    function_with_gradient,
]


def loss_of(field: Function, chunk: int, shading: str) -> Tensor:
    config = RendererConfig(step=0.04, max_samples_per_chunk=chunk, backend="reference")
    output = VolumeRenderer(field, config=config).render(make_rays(), shading=shading, light=LIGHT)
    mix = torch.linspace(-1, 2, output.color.numel(), dtype=torch.float64)
    assert chunk == ONE or output.samples > 4 * chunk
    return (output.color.flatten() * mix).sum() + output.depth.square().sum()


@pytest.mark.parametrize("shading", ["albedo", "lambertian"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_gradients_are_those_of_one_chunk(case: Case, shading: str) -> None:
    field, wanted = case()
    expected = torch.autograd.grad(loss_of(field, ONE, shading), wanted, retain_graph=True)
    assert all(float(grad.abs().max()) > 1e-3 for grad in expected)
    for chunk in CHUNKS:
        field, wanted = case()
        given = torch.autograd.grad(loss_of(field, chunk, shading), wanted)
        field, leaves = case()
        loss_of(field, chunk, shading).backward()
        for a, b in zip(given, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        for leaf, b in zip(leaves, expected, strict=True):
            torch.testing.assert_close(leaf.grad, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shading", ["albedo", "lambertian"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_two_renders_before_one_backward(case: Case, shading: str) -> None:
    results = []
    for chunks in ((ONE, ONE), (97, 211), (ONE, 97)):
        field, wanted = case()
        loss = loss_of(field, chunks[0], shading) + 0.5 * loss_of(field, chunks[1], "albedo").square()
        results.append(torch.autograd.grad(loss, wanted))
    for given in results[1:]:
        for a, b in zip(given, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", [leaf_read_in_places, weights_from_a_network], ids=lambda case: case.__name__)
def test_one_render_and_two_backwards(case: Case) -> None:
    field, wanted = case()
    loss = loss_of(field, 97, "lambertian")
    once, again = (torch.autograd.grad(loss, wanted, retain_graph=True) for _ in range(2))
    for a, b in zip(again, once, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_rays_of_a_graph_that_the_field_reads_too() -> None:
    """The rays come from a tensor that the field reads, and from a tensor made of it."""
    results = []
    for chunk in (ONE, *CHUNKS):
        shift = numbers(3)
        made = 0.1 * shift.tanh()
        rays = make_rays()
        config = RendererConfig(step=0.04, max_samples_per_chunk=chunk, backend="reference")
        view = VolumeRenderer(lambda x, a=shift, b=made: (blob(x - 0.1 * a), torch.sigmoid(x + b)), config=config)
        output = view.render(Rays(rays.origins + made, rays.directions), shading="lambertian", light=LIGHT + made)
        results.append(torch.autograd.grad(output.color.square().sum(), shift)[0])
    for given in results[1:]:
        torch.testing.assert_close(given, results[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shading", ["albedo", "lambertian"])
@pytest.mark.parametrize("opacity_only", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_nothing_that_the_field_makes_is_held(case: Case, opacity_only: bool, shading: str) -> None:
    """Neither after forward, whatever the number of chunks, nor of more than a chunk in backward."""
    field, _ = case()
    made: list[tuple[TensorWeakRef, int]] = []
    most = 0

    def alive() -> int:
        return sum(size for ref, size in made if ref() is not None)

    def watched(positions: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal most
        most = max(most, alive())
        density, color = field(positions)
        middle = [density.sqrt(), color.exp()]
        made.extend((TensorWeakRef(t), t.shape[0]) for t in middle)
        return middle[0].square(), middle[1].log()

    config = RendererConfig(step=0.04, max_samples_per_chunk=97, backend="reference")
    output = VolumeRenderer(watched, config=config).render(make_rays(), shading=shading, light=LIGHT)
    assert len(made) >= 2 * output.samples / 97
    assert alive() == 0
    (output.opacity if opacity_only else output.color).sum().backward()
    assert most <= 2 * 97


@pytest.mark.parametrize("case", [leaf_read_in_places, leaf_and_what_is_made_of_it], ids=lambda case: case.__name__)
def test_changing_what_is_read_before_backward_is_an_error(case: Case) -> None:
    field, wanted = case()
    loss = loss_of(field, 97, "albedo")
    with torch.no_grad():
        wanted[0].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("autocast", [False, True])
def test_a_module_is_asked_twice_per_chunk(autocast: bool) -> None:
    """Weights that autocast has cast before are no graph of the caller's."""
    layer = nn.Linear(3, 4)
    asked: list[torch.dtype] = []

    def field(positions: Tensor) -> tuple[Tensor, Tensor]:
        out = layer(positions)
        asked.append(out.dtype)
        return out[:, 0].float().exp(), out[:, 1:].float().sigmoid()

    config = RendererConfig(step=0.04, max_samples_per_chunk=97, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = VolumeRenderer(field, config=config).render(make_rays().to(dtype=torch.float32))
    in_forward = len(asked)
    assert in_forward >= output.samples / 97
    output.color.sum().backward()
    assert len(asked) == 2 * in_forward
    assert set(asked) == {torch.bfloat16 if autocast else torch.float32}
