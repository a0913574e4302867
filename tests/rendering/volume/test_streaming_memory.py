"""The built-in field's own path: what is held for backward, what happens when memory ends, how many tiles are made."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from streaming_cases import (
    EVERYTHING,
    LIGHT,
    STEP,
    assert_equal,
    loss_of,
    make_field,
    make_occupancy,
    make_rays,
    render_with_gradients,
    streamed,
)
from torch import Tensor

from dreamfusion_fast.ops.sample_head import SampleHead
from dreamfusion_fast.ops.tiles.ray_sums import SampleTile
from dreamfusion_fast.rendering import OccupancyGrid, RendererConfig, VolumeRenderer
from dreamfusion_fast.rendering.volume import streaming

ALL = {"shading": "lambertian", **EVERYTHING}
SMALLEST = 1024  # samples of a tile below which no renderer goes, however small the budget
LITTLE, PLENTY = 1, 1 << 30


def make_view(occupancy: OccupancyGrid | None = None, step: float = STEP, **config: Any) -> VolumeRenderer:
    return VolumeRenderer(make_field(), occupancy, RendererConfig(step=step, **config))


# What is held.


def _storages() -> dict[int, int]:
    """Bytes of all storages that Python can see, by address; fake tensors of other tests have none."""
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


class _Held:
    """A tensor that autograd keeps, where Python can see it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _held_by(render: Callable[[], Any]) -> tuple[Any, int]:
    """The output of `render`, and the bytes that live because of it: the outputs, what their graph saved, and what its
    nodes hold besides."""
    gc.collect()
    before = _storages()
    with torch.autograd.graph.saved_tensors_hooks(_Held, lambda held: held.tensor):
        output = render()
    gc.collect()
    after = _storages()
    return output, sum(size for address, size in after.items() if address not in before)


@pytest.mark.quick(1)
@pytest.mark.parametrize("options", [{}, ALL], ids=["albedo", "all losses"])
def test_nothing_is_held_per_sample_with_a_small_budget(options: dict[str, Any]) -> None:
    """Held are some numbers per ray and, for each tile of 1024 samples, two sums and eight small integers."""
    rays, light = make_rays(), LIGHT.clone()
    held, samples = [], []
    for step in (0.004, 0.001):
        view = make_view(step=step, memory_budget=LITTLE)
        output, size = _held_by(lambda view=view: view.render(rays, light=light, **options))
        assert streamed(output)
        held.append(size)
        samples.append(output.samples)
    assert samples[0] > 10 * SMALLEST
    tiles = (samples[1] - samples[0]) / SMALLEST
    assert tiles > 30
    assert held[1] - held[0] < 60 * (tiles + 1)
    assert held[0] < 400 * len(rays) + 60 * (samples[0] / SMALLEST + 1)


def test_all_is_kept_with_a_large_budget_and_gives_the_same() -> None:
    rays, light = make_rays(), LIGHT.clone()
    little, plenty = (make_view(step=0.004, memory_budget=budget) for budget in (LITTLE, PLENTY))
    output, held = _held_by(lambda: plenty.render(rays, light=light, **ALL))
    per_sample = 2 * 8 * 6 + 8 * (1 + 3 + 4 + 3)  # encoding and its gradient; distance, position, logits and slopes
    assert held > per_sample * output.samples
    results = [render_with_gradients(view, rays, **ALL) for view in (little, plenty)]
    assert_equal(*results, 1e-12)


class _Marched:
    """Counts the tiles that are marched, and the buffers that they are marched into."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.buffers: list[Tensor] = []
        original = streaming.march_tile

        def counted(*arguments: Any) -> None:
            self.buffers.append(next(a for a in arguments if isinstance(a, Tensor) and a.dtype == torch.float64))
            original(*arguments)

        monkeypatch.setattr(streaming, "march_tile", counted)

    def addresses(self) -> set[int]:
        return {buffer.data_ptr() for buffer in self.buffers}


def test_kept_tiles_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a large budget each tile is marched once, into buffers of its own; with a small one twice, into the same."""
    marched, config = _Marched(monkeypatch), {"step": 0.01, "max_samples_per_chunk": SMALLEST}
    for budget, passes in ((LITTLE, 2), (PLENTY, 1)):
        view = make_view(memory_budget=budget, **config)
        output = view.render(make_rays())
        tiles = len(marched.buffers)
        assert tiles == -(-output.samples // SMALLEST) > 5
        assert len(marched.addresses()) == (1 if budget == LITTLE else tiles)
        output.color.sum().backward()
        assert len(marched.buffers) == passes * tiles
        marched.buffers.clear()


@pytest.mark.parametrize("why", ["no_grad", "inference_mode", "frozen"])
def test_nothing_is_kept_where_no_backward_can_follow(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    marched = _Marched(monkeypatch)
    view = make_view(step=0.01, memory_budget=PLENTY, max_samples_per_chunk=SMALLEST)
    wanted = view.render(make_rays()).color.detach()
    assert len(marched.addresses()) == len(marched.buffers) > 5
    marched.buffers.clear()
    view.requires_grad_(why != "frozen")
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "frozen": nullcontext}[why]():
        given = view.render(make_rays()).color
    assert len(marched.addresses()) == 1
    torch.testing.assert_close(given, wanted, rtol=1e-12, atol=0)


def test_a_render_without_gradients_holds_its_outputs_only() -> None:
    view, rays = make_view(step=0.004, memory_budget=PLENTY), make_rays()
    with torch.no_grad():
        output, held = _held_by(lambda: view.render(rays))
    assert output.samples > 10 * SMALLEST
    assert held < 400 * len(rays)


def test_backward_can_be_repeated() -> None:
    rays, results = make_rays(), []
    for budget in (LITTLE, PLENTY):
        view = make_view(step=0.01, memory_budget=budget)
        loss = view.render(rays, light=LIGHT, **ALL).color.sum()
        parameters = list(view.field.parameters())
        results += [torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(2)]
        results.append(torch.autograd.grad(loss, parameters))
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(loss, parameters)
    for given in results[1:]:
        for a, b in zip(given, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * float(b.abs().max()))


def test_two_renders_before_their_backwards_do_not_share_anything() -> None:
    """Renders of one renderer, each with its own tiles, gone back in the order in which they were made."""
    rays = [make_rays(41), make_rays(17)]
    wanted = [render_with_gradients(make_view(), part, **ALL)[1]["table"] for part in rays]
    background = [
        torch.rand(len(part), 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64) for part in rays
    ]
    view = make_view()
    outputs = [view.render(part, back, light=LIGHT, **ALL) for part, back in zip(rays, background, strict=True)]
    given = [torch.autograd.grad(loss, view.field.table)[0] for loss in map(loss_of, outputs)]
    for a, b in zip(given, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * float(b.abs().max()))


# When memory ends.


class _Ladder:
    """Makes a function of the renderer run out of memory for tiles of more than so many samples."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, most: int) -> None:
        self.refused: list[int] = []
        original = getattr(streaming, name)

        def limited(head: SampleHead, tile: SampleTile, *rest: Any) -> None:
            size = tile.t.shape[0]
            if size > most:
                self.refused.append(size)
                raise torch.OutOfMemoryError(f"{name} of {size} samples")
            original(head, tile, *rest)

        monkeypatch.setattr(streaming, name, limited)


@pytest.mark.parametrize("budget", [20 << 20, PLENTY], ids=["recomputed", "kept"])
@pytest.mark.parametrize("early_stop", [0.0, 0.3])
@pytest.mark.parametrize("name", ["ray_sums_forward", "ray_sums_backward", "ray_sums_visible"])
def test_smaller_tiles_are_tried_when_memory_ends(
    monkeypatch: pytest.MonkeyPatch, name: str, early_stop: float, budget: int
) -> None:
    if name == "ray_sums_visible" and early_stop == 0.0:
        early_stop = 1e-9  # it takes a density pass, which drops next to nothing
    rays = make_rays()
    config = {"step": 0.002, "early_stop": early_stop, "memory_budget": budget}
    wanted = render_with_gradients(make_view(**config), rays, **ALL)
    assert wanted[0].samples > 3 * 8192
    ladder = _Ladder(monkeypatch, name, 2500)
    given = render_with_gradients(make_view(**config), rays, **ALL)
    assert len(ladder.refused) >= 2
    assert all(size > 2500 for size in ladder.refused)
    assert_equal(given, wanted, 1e-12)


@pytest.mark.parametrize("name", ["ray_sums_forward", "ray_sums_backward", "ray_sums_visible"])
def test_an_error_remains_one_when_even_the_smallest_tile_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ladder = _Ladder(monkeypatch, name, 100)
    with pytest.raises(torch.OutOfMemoryError, match=rf"{name} of \d+ samples"):
        render_with_gradients(make_view(step=0.01, early_stop=0.1), make_rays(), **ALL)
    assert ladder.refused[0] > 2 * SMALLEST
    assert SMALLEST // 2 < ladder.refused[-1] <= SMALLEST
    assert ladder.refused == sorted(ladder.refused, reverse=True)
    monkeypatch.undo()
    # And what failed spoiled nothing.
    render_with_gradients(make_view(step=0.01), make_rays(), **ALL)


# How many tiles are made before the number of samples is known.


def _one_cell(resolution: int) -> Tensor:
    occupied = torch.zeros((resolution,) * 3, dtype=torch.bool)
    occupied[(resolution // 2,) * 3] = True
    return occupied


@pytest.mark.parametrize("config", [{}, {"memory_budget": LITTLE}, {"early_stop": 0.3}, {"max_samples_per_chunk": 999}])
@pytest.mark.parametrize("order", ["few, then many", "many, then few", "none, then many"])
def test_what_was_expected_drops_no_sample(device: torch.device, config: dict[str, Any], order: str) -> None:
    """The second render has tiles for the first one's samples and a reserve, or for more than it has."""
    few = _one_cell(16) if order != "none, then many" else torch.zeros(16, 16, 16, dtype=torch.bool)
    many = torch.ones(16, 16, 16, dtype=torch.bool)
    first, second = (many, few) if order == "many, then few" else (few, many)
    rays, step = make_rays(65).to(device), 0.004
    occupancy = make_occupancy(0.0, 16).to(device)
    view = make_view(occupancy, step, **config).to(device)
    fresh = make_view(occupancy, step, **config).to(device)
    occupancy.set_occupied(first.to(device))
    before = render_with_gradients(view, rays, jitter=True)
    occupancy.set_occupied(second.to(device))
    after = render_with_gradients(view, rays, jitter=True)
    counts = sorted((before[0].samples, after[0].samples))
    assert counts[1] > 2 * counts[0] + 20000
    wanted = render_with_gradients(fresh, rays, jitter=True)
    assert_equal(after, wanted, 1e-12)
    assert_equal(render_with_gradients(view, rays, jitter=True), wanted, 1e-12)
