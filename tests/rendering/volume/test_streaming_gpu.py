"""The built-in field's own path on a GPU: its numbers, its streams, training without a wait, and CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from streaming_cases import (
    EVERYTHING,
    LIGHT,
    STEP,
    assert_equal,
    make_field,
    make_occupancy,
    make_rays,
    relative_errors,
    render_with_gradients,
    smooth_scene,
    streamed,
)
from torch import Tensor

from dreamfusion_fast.rendering import OccupancyGrid, Rays, RendererConfig, RenderOutput, VolumeRenderer

pytestmark = pytest.mark.gpu

LIT = {"shading": "lambertian"}
ALL = {**LIT, **EVERYTHING}
OPTIONS = pytest.mark.parametrize("options", [{}, LIT, ALL], ids=["albedo", "lambertian", "all losses"])


# Numbers.


@OPTIONS
def test_float32_agrees_with_float64_on_a_cpu(options: dict[str, Any]) -> None:
    """On a smooth and coarse field, for the reason that `streaming_cases.SMOOTH` gives."""
    given = render_with_gradients(*smooth_scene(torch.float32, "cuda"), **options)
    assert streamed(given[0])
    errors = relative_errors(given, render_with_gradients(*smooth_scene(torch.float64), **options))
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}


@pytest.mark.parametrize(("precision", "rounding"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
@OPTIONS
def test_half_precision_is_as_good_as_its_rounding(options: dict[str, Any], precision: str, rounding: float) -> None:
    """Errors by norm, in roundings of the precision.

    Sums over samples average them out, most of all in colours. Gradients of biases are small differences of such sums,
    and where gradients are multiplied, float16 makes room for bfloat16. The bounds are some twice what the same
    roundings gave on a CPU.
    """
    given = render_with_gradients(*smooth_scene(torch.float32, "cuda", mlp_dtype=precision), **options)
    assert streamed(given[0])
    errors = relative_errors(given, render_with_gradients(*smooth_scene(torch.float64), **options))
    bad = {}
    for name, error in errors.items():
        bound = 20.0 if name.endswith("bias") else 10.0 if name.startswith("gradient") else 0.25
        if not error <= bound * rounding:
            bad[name] = error / rounding
    assert bad == {}
    assert errors["gradient of table"] > 0.05 * rounding  # it is in use


@OPTIONS
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_size_of_tiles_does_not_matter(options: dict[str, Any], precision: str) -> None:
    """Up to the order of sums, which atomics leave open; roundings to 16 bits are those of samples, not of tiles."""
    view, rays = smooth_scene(torch.float32, "cuda", mlp_dtype=precision)
    wanted = render_with_gradients(view, rays, **options)
    for tile in (7, 64, 1000, 10**9):
        parts = VolumeRenderer(view.field, config=RendererConfig(step=STEP, max_samples_per_chunk=tile))
        assert_equal(render_with_gradients(parts, rays, **options), wanted, 1e-5)


def test_memory_stays_within_the_budget() -> None:
    """Millions of samples in a few megabytes, forward and backward, in tiles that are recomputed."""
    view, _ = smooth_scene(torch.float32, "cuda")
    view = VolumeRenderer(view.field, config=RendererConfig(step=1e-3, memory_budget=8 << 20))
    rays, background = make_rays(4096, torch.float32).to("cuda"), torch.ones(3, device="cuda")
    light = LIGHT.to(rays.origins)
    view.render(rays[:5], background, light=light, **ALL).color.sum().backward()  # kernels are loaded
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = view.render(rays, background, light=light, **ALL)
    output.color.sum().backward()
    torch.cuda.synchronize()
    assert output.samples > 3_000_000
    assert torch.cuda.max_memory_allocated() - before < 32 << 20


def test_more_samples_than_offsets_can_count_are_an_error() -> None:
    """130 rays of 2^24 samples (but for one that rounds to the wall) are 2^25 more than 2^31. They are only counted."""
    view = VolumeRenderer(make_field(dtype=torch.float32, hidden=16), config=RendererConfig(step=1e-7)).to("cuda")
    down = torch.tensor([0.0, 0.0, -1.0], device="cuda").expand(130, 3)
    hits = Rays(torch.tensor([0.1, 0.2, 3.0], device="cuda").expand(130, 3), down)
    message = r"218103(8080|7950) samples, more than 2\^31 - 1"
    with pytest.raises(RuntimeError, match=message):
        view.render(hits)
    # Another number is expected: tiles are enqueued before the true one is known.
    assert view.render(Rays(hits.origins, -down)).samples == 0
    with pytest.raises(RuntimeError, match=message):
        view.render(hits)
    torch.cuda.synchronize()
    assert view.render(Rays(hits.origins, -down)).samples == 0


# Streams.


def test_everything_runs_on_the_current_stream() -> None:
    """The table becomes what it should be late on another stream: work on any other one would not see it."""
    view, rays = smooth_scene(torch.float32, "cuda")
    parameters = list(view.field.parameters())
    light, mix = LIGHT.to(rays.origins), torch.linspace(-1, 1, 3, device="cuda")

    def render() -> tuple[Tensor, ...]:
        output = view.render(rays, light=light, **ALL)
        return output.color.detach(), *torch.autograd.grad((output.color * mix).sum(), parameters)

    table = view.field.table.detach().clone()
    wanted = render()
    with torch.no_grad():
        view.field.table.zero_()
    early = render()
    assert float((early[0] - wanted[0]).abs().max()) > 1e-3
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        with torch.no_grad():
            view.field.table.copy_(table)
        given = render()
    torch.cuda.synchronize()
    for a, b in zip(given, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


# Training.


class Training:
    """A field that is trained towards random colours. Two of the same settings do the same, up to rounding.

    The eps of Adam is large, so that its steps are a smooth function of the gradients, whose last digits atomics leave
    open.
    """

    def __init__(self, precision: str = "float32", capturable: bool = False) -> None:
        scene, self.rays = smooth_scene(torch.float32, "cuda", mlp_dtype=precision)
        self.field = scene.field
        self.view = VolumeRenderer(self.field, make_occupancy(0.5, 16).to("cuda"), RendererConfig(step=STEP / 4))
        draws = torch.Generator().manual_seed(9)
        self.background, self.target = torch.rand(2, len(self.rays), 3, generator=draws).to("cuda")
        self.light = LIGHT.to(self.rays.origins)
        self.optimizer = torch.optim.Adam(self.field.parameters(), lr=1e-2, eps=1e-2, fused=True, capturable=capturable)

    def step(self) -> tuple[RenderOutput, Tensor]:
        output = self.view.render(self.rays, self.background, light=self.light, jitter=True, seed=3, **ALL)
        loss = (output.color - self.target).square().sum()
        loss = loss + output.orientation_loss + output.distortion_loss + 0.01 * output.sample_entropy_loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return output, loss.detach()

    def warm_up(self, steps: int) -> None:
        """On a stream of its own, as a capture wants it."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(steps):
                self.step()
        torch.cuda.current_stream().wait_stream(side)


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_a_training_step_never_waits_for_the_gpu(precision: str) -> None:
    training = Training(precision)
    losses = [training.step()[1] for _ in range(2)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses += [training.step()[1] for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()
    assert float(losses[-1]) < float(losses[0])


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_replays_of_a_captured_step_follow_the_eager_ones(precision: str) -> None:
    eager, captured = Training(precision, capturable=True), Training(precision, capturable=True)
    eager.warm_up(3)
    captured.warm_up(3)
    graph = torch.cuda.CUDAGraph()
    captured.optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        output, loss = captured.step()
    # A capture runs nothing: both are after the third step. Rounding differs by the order of sums; with 16 bits a
    # table entry may also round the other way.
    tolerance = 1e-4 if precision == "float32" else 3e-3
    for _ in range(5):
        wanted_output, wanted = eager.step()
        graph.replay()
        torch.testing.assert_close(loss, wanted, rtol=tolerance, atol=0)
        assert not bool(output.overflowed)
        assert int(output.samples) == wanted_output.samples
    for a, b in zip(captured.field.parameters(), eager.field.parameters(), strict=True):
        assert float((a - b).norm() / b.norm()) < tolerance
    start = Training(precision).field.table
    assert float((eager.field.table - start).norm() / start.norm()) > 3 * tolerance


def _capture(
    view: VolumeRenderer, rays: Rays, mix: Tensor
) -> tuple[torch.cuda.CUDAGraph, RenderOutput, tuple[Tensor, ...]]:
    parameters = list(view.field.parameters())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = view.render(rays)
        gradients = torch.autograd.grad((output.color * mix).sum(), parameters)
    return graph, output, gradients


def test_a_graph_says_that_it_was_captured_for_fewer_samples() -> None:
    scene, rays = smooth_scene(torch.float32, "cuda")
    occupancy = OccupancyGrid(resolution=16).to("cuda")
    few, many = torch.tensor([False, True], device="cuda")[:, None, None, None].repeat(1, 16, 16, 16)
    few[6:10, 6:10, 6:10] = True
    view = VolumeRenderer(scene.field, occupancy, RendererConfig(step=0.004))
    parameters, mix = list(scene.field.parameters()), torch.linspace(-1, 1, 3, device="cuda")

    def eager() -> tuple[RenderOutput, tuple[Tensor, ...]]:
        output = VolumeRenderer(scene.field, occupancy, view.config).render(rays)
        return output, torch.autograd.grad((output.color * mix).sum(), parameters)

    def assert_right(output: RenderOutput, gradients: tuple[Tensor, ...]) -> None:
        wanted, wanted_gradients = eager()
        assert not bool(output.overflowed)
        assert int(output.samples) == wanted.samples
        torch.testing.assert_close(output.color, wanted.color, rtol=1e-5, atol=1e-6)
        for a, b in zip(gradients, wanted_gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))

    occupancy.set_occupied(few)
    assert 0 < view.render(rays).samples < 4096
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad((view.render(rays).color * mix).sum(), parameters)
    torch.cuda.current_stream().wait_stream(side)
    graph, output, gradients = _capture(view, rays, mix)
    graph.replay()
    assert_right(output, gradients)

    occupancy.set_occupied(many)
    graph.replay()
    assert bool(output.overflowed)
    assert int(output.samples) > 20000
    for value in (output.color, output.opacity, output.depth):
        assert bool(value.isnan().all())

    # It recovers with the scene, and a new capture, after an eager render has counted, has room.
    occupancy.set_occupied(few)
    graph.replay()
    assert_right(output, gradients)
    occupancy.set_occupied(many)
    assert view.render(rays).samples > 20000
    graph, output, gradients = _capture(view, rays, mix)
    graph.replay()
    assert_right(output, gradients)


def test_a_graph_that_knows_nothing_has_room_for_all() -> None:
    """Captured without an eager render of that many rays: tiles for as many samples as the box can hold."""
    scene, rays = smooth_scene(torch.float32, "cuda")
    view = VolumeRenderer(scene.field, config=RendererConfig(step=STEP))
    with torch.no_grad():  # a graph of the default stream that is alive would draw that stream into the capture
        wanted = view.render(rays)
    fresh, mix = VolumeRenderer(scene.field, config=view.config), torch.ones(3, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are loaded, and the next number of rays is another
        torch.autograd.grad(fresh.render(rays[:7]).color.sum(), list(scene.field.parameters()))
    torch.cuda.current_stream().wait_stream(side)
    graph, output, _ = _capture(fresh, rays, mix)
    graph.replay()
    assert not bool(output.overflowed)
    assert int(output.samples) == wanted.samples
    torch.testing.assert_close(output.color, wanted.color, rtol=1e-5, atol=1e-6)
