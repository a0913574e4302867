"""Small renders that run as CUDA graphs by themselves: the same numbers as without, and what they give way to."""

from __future__ import annotations

import copy
import gc
import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from streaming_cases import EVERYTHING, LIGHT, STEP, assert_equal, differentiate, render_with_gradients, smooth_scene
from torch import Tensor

from dreamfusion_fast.rendering import (
    InvalidRaysError,
    OccupancyGrid,
    Rays,
    RendererConfig,
    RenderOutput,
    VolumeRenderer,
)
from dreamfusion_fast.rendering.volume import graphs as module
from dreamfusion_fast.rendering.volume.streaming import StreamedRender

gpu = pytest.mark.gpu
LIT = {"shading": "lambertian"}
OPTIONS = pytest.mark.parametrize("options", [{}, LIT, LIT | EVERYTHING], ids=["albedo", "lambertian", "all losses"])
Result = tuple[RenderOutput, dict[str, Tensor]]


class Pair:
    """The same scene twice: one renderer may use graphs, the other may not."""

    def __init__(self, precision: str = "float32", occupancy: OccupancyGrid | None = None) -> None:
        scene, self.rays = smooth_scene(torch.float32, "cuda", mlp_dtype=precision)
        self.field = scene.field
        config = RendererConfig(step=STEP)
        self.view = VolumeRenderer(self.field, occupancy, config)
        self.plain = VolumeRenderer(self.field, occupancy, replace(config, graphs=False))

    def warm_up(self, **options: Any) -> None:
        for _ in range(5):
            render_with_gradients(self.view, self.rays, **options)

    def check(self, given: Result, rays: Rays | None = None, background: Tensor | None = None, **options: Any) -> None:
        wanted = render_with_gradients(self.plain, self.rays if rays is None else rays, background, **options)
        assert_equal(given, wanted, 1e-5)


class Counts:
    """How often renders ran as they are: launches of a capture count, those of a replay do not."""

    def __init__(self) -> None:
        self.forward = 0


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counts:
    counts, run = Counts(), StreamedRender.forward

    def counted(self: StreamedRender, training: bool) -> Tensor:
        counts.forward += 1
        return run(self, training)

    monkeypatch.setattr(StreamedRender, "forward", counted)
    return counts


def turned(rays: Rays, k: int) -> Rays:
    """Other rays, as many."""
    return Rays(rays.origins.roll(k, 0), rays.directions.roll(k, 0))


@gpu
@OPTIONS
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_the_same_as_without(options: dict[str, Any], precision: str, launched: Counts) -> None:
    """Rays, light, background and seed are others each time, and the field has moved."""
    pair = Pair(precision)
    for k in range(9):
        rays = turned(pair.rays, k)
        light = (LIGHT + 0.3 * k).to(rays.origins)
        before = launched.forward
        given = render_with_gradients(pair.view, rays, light=light, jitter=True, seed=k, **options)
        # The first one counts the samples, three more show that they are alike, the next one is captured.
        assert launched.forward - before == (1 if k <= 4 else 0), k
        pair.check(given, rays, light=light, jitter=True, seed=k, **options)
        with torch.no_grad():
            for parameter in pair.field.parameters():
                parameter.mul_(0.98)


@gpu
def test_a_seed_on_the_gpu() -> None:
    pair = Pair()
    seeds = [torch.tensor(k, device="cuda") for k in (1, 2)]
    for k in range(8):
        given = render_with_gradients(pair.view, pair.rays, jitter=True, seed=seeds[k % 2])
        pair.check(given, jitter=True, seed=k % 2 + 1)


@gpu
def test_a_step_with_its_capture_never_waits_for_the_gpu() -> None:
    pair = Pair("float16")
    render_with_gradients(pair.view, pair.rays)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            pair.view.render(pair.rays).color.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert pair.view._graphs._graphs


def graph_pools() -> int:
    """How many memory pools of CUDA graphs the allocator holds, those of graphs that are gone included."""
    return len({tuple(segment["segment_pool_id"]) for segment in torch.cuda.memory_snapshot()} - {(0, 0)})


@gpu
def test_more_samples_than_there_is_room_for(launched: Counts) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    pools = graph_pools()
    occupancy = OccupancyGrid(resolution=16).to("cuda")
    few, many = torch.tensor([False, True], device="cuda")[:, None, None, None].repeat(1, 16, 16, 16)
    few[6:10, 6:10, 6:10] = True
    pair = Pair(occupancy=occupancy)
    pair.view.config = pair.plain.config = RendererConfig(step=0.004)
    pair.plain.config = replace(pair.view.config, graphs=False)
    for occupied, replays in ((few, False), (few, True), (many, False), (many, True), (few, True)):
        occupancy.set_occupied(occupied)
        if replays:
            pair.warm_up()
        before = launched.forward
        given = render_with_gradients(pair.view, pair.rays)
        if replays:
            assert launched.forward == before
            assert graph_pools() == pools + 1
        pair.check(given)
        del given  # its backward would need what it was rendered with


@gpu
def test_two_renders_before_their_backwards(launched: Counts) -> None:
    pair = Pair()
    pair.warm_up()
    views = [pair.rays, turned(pair.rays, 5)]
    background = torch.ones(3, device="cuda", requires_grad=True)

    def both(view: VolumeRenderer) -> Result:
        first = view.render(views[0], background)
        second, gradients = differentiate(view, lambda: view.render(views[1], background))
        gradients_of_first = torch.autograd.grad(first.color.square().sum(), list(view.field.parameters()))
        names = [name for name, _ in view.field.named_parameters()]
        return second, gradients | {f"first {name}": g for name, g in zip(names, gradients_of_first, strict=True)}

    before = launched.forward
    given = both(pair.view)
    assert launched.forward - before == 1  # the second; the first one is replayed, and its buffers are left alone
    assert_equal(given, both(pair.plain), 1e-5)


@gpu
def test_backward_again_after_another_render(launched: Counts) -> None:
    pair = Pair()
    pair.warm_up()
    parameters = list(pair.field.parameters())
    loss = pair.view.render(pair.rays).color.square().sum()
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    again = torch.autograd.grad(loss, parameters, retain_graph=True)
    pair.view.render(turned(pair.rays, 7)).color.sum().backward()
    before = launched.forward
    last = torch.autograd.grad(loss, parameters)
    assert launched.forward - before == 1
    for a, b, c in zip(first, again, last, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-5 * float(a.abs().max()))
        torch.testing.assert_close(c, a, rtol=0, atol=1e-5 * float(a.abs().max()))


@gpu
def test_parameters_that_have_moved_in_memory() -> None:
    pair = Pair()
    pair.warm_up()
    with torch.no_grad():
        for parameter in pair.field.parameters():
            parameter.data = parameter * 1.5
    for _ in range(6):
        pair.check(render_with_gradients(pair.view, pair.rays))


@gpu
@pytest.mark.parametrize("frozen", ["table", "layers"])
def test_some_parameters_want_no_gradient(frozen: str) -> None:
    pair = Pair()
    for name, parameter in pair.field.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    wanted = [parameter for parameter in pair.field.parameters() if parameter.requires_grad]

    def gradients(view: VolumeRenderer) -> tuple[Tensor, ...]:
        output = view.render(pair.rays, shading="lambertian", light=LIGHT.to(pair.rays.origins))
        return torch.autograd.grad(output.color.square().sum(), wanted)

    for _ in range(6):
        for a, b in zip(gradients(pair.view), gradients(pair.plain), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


@gpu
def test_another_stream_has_graphs_of_its_own(launched: Counts) -> None:
    pair = Pair()
    pair.warm_up()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    before = launched.forward
    with torch.cuda.stream(side):
        given = render_with_gradients(pair.view, pair.rays)
    torch.cuda.current_stream().wait_stream(side)
    assert launched.forward - before == 1
    pair.check(given)


@gpu
@pytest.mark.parametrize("what", ["table", "origins"])
def test_a_change_between_forward_and_backward_is_an_error(what: str) -> None:
    pair = Pair()
    pair.warm_up()
    loss = pair.view.render(pair.rays).color.sum()
    with torch.no_grad():
        (pair.field.table if what == "table" else pair.rays.origins).add_(0.01)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@gpu
def test_invalid_rays_are_named() -> None:
    pair = Pair()
    pair.warm_up()
    bad = pair.rays.origins.clone()
    bad[3] = float("nan")
    with pytest.raises(InvalidRaysError, match="ray 3 is not finite"):
        pair.view.render(replace(pair.rays, origins=bad))
    pair.check(render_with_gradients(pair.view, pair.rays))


@gpu
def test_no_graphs_where_nothing_is_trained_or_much_is_rendered(launched: Counts) -> None:
    pair = Pair()
    with torch.no_grad():
        for _ in range(6):
            pair.view.render(pair.rays)
    assert launched.forward == 6
    large = VolumeRenderer(pair.field, config=RendererConfig(step=5e-4))
    for _ in range(6):
        output = large.render(pair.rays)
        output.color.sum().backward()
    assert output.samples > module.MAX_SAMPLES
    assert launched.forward == 12


@gpu
def test_memory_is_kept_for_a_few_kinds_only() -> None:
    pair = Pair()
    allocated = []
    for k in range(2 * module.MAX_GRAPHS):
        for _ in range(5):
            pair.view.render(pair.rays[: 50 + k]).color.sum().backward()
        torch.cuda.synchronize()
        allocated.append(torch.cuda.memory_allocated())
    assert allocated[0] < allocated[module.MAX_GRAPHS - 1]
    for later in allocated[module.MAX_GRAPHS :]:
        assert later < 1.1 * allocated[module.MAX_GRAPHS - 1]


@gpu
def test_a_copy_of_a_renderer_begins_without_graphs(launched: Counts) -> None:
    pair = Pair()
    pair.warm_up()
    buffer = io.BytesIO()
    torch.save(pair.view, buffer)
    buffer.seek(0)
    for view in (copy.deepcopy(pair.view), torch.load(buffer, weights_only=False)):
        before = launched.forward
        given = render_with_gradients(view, pair.rays)
        assert launched.forward - before == 1
        pair.check(given)


def test_on_a_cpu_there_are_none() -> None:
    view, rays = smooth_scene(torch.float32)
    for _ in range(6):
        view.render(rays).color.sum().backward()
    assert not view._graphs._seen
    assert not view._graphs._graphs
