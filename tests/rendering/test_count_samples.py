"""Samples that are counted ahead of a render: the same render, and on a GPU one that nothing waits for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from streaming_cases import EVERYTHING, LIGHT, STEP, assert_equal, make_field, make_occupancy, make_rays, smooth_scene
from torch import Tensor

from dreamfusion_fast.rendering import (
    InvalidRaysError,
    OccupancyGrid,
    Rays,
    RendererConfig,
    RenderOutput,
    VolumeRenderer,
)
from dreamfusion_fast.rendering.sample_total import SampleTotal

DEVICES = pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
OPTIONS: dict[str, Any] = {"shading": "lambertian", "jitter": True, "seed": 7, **EVERYTHING}


def scene_on(name: str, **changes: Any) -> tuple[VolumeRenderer, Rays]:
    occupancy = make_occupancy(0.5).to(name)
    field = make_field(dtype=torch.float32).to(name)
    return VolumeRenderer(field, occupancy, RendererConfig(step=STEP, **changes)), make_rays().to(name, torch.float32)


def with_gradients(renderer: VolumeRenderer, rays: Rays, **options: Any) -> tuple[RenderOutput, dict[str, Tensor]]:
    """Like `streaming_cases.render_with_gradients`, without its copies from ordinary memory, which wait for a GPU."""
    renderer.zero_grad()
    output = renderer.render(rays, **options)
    output.color.square().sum().backward()
    return output, {name: p.grad.clone() for name, p in renderer.named_parameters() if p.grad is not None}


@DEVICES
@pytest.mark.parametrize("tile", [None, 37])
def test_the_same_render(name: str, tile: int | None) -> None:
    renderer, rays = scene_on(name, max_samples_per_chunk=tile)
    options = OPTIONS | {"light": LIGHT.to(rays.origins)}
    wanted = with_gradients(renderer, rays, **options)
    count = renderer.count_samples(rays, True, 7)
    assert count.total.read() == wanted[0].samples > 37
    for _ in range(8):  # on a GPU the last ones are graphs
        assert_equal(with_gradients(renderer, rays, count=count, **options), wanted, 1e-5)


@DEVICES
def test_counts_of_several_renders_may_be_on_their_way(name: str) -> None:
    renderer, rays = scene_on(name)
    parts = [rays[:5], rays[5:23], rays[:0], rays[23:]]
    wanted = [renderer.render(part).samples for part in parts]
    counts = [renderer.count_samples(part) for part in parts]
    assert [renderer.render(part, count=count).samples for part, count in zip(parts, counts, strict=True)] == wanted
    assert len(set(wanted)) == 4


@DEVICES
def test_early_stop_counts_by_itself(name: str) -> None:
    renderer, rays = scene_on(name, early_stop=0.5)
    wanted = renderer.render(rays)
    count = renderer.count_samples(rays)
    assert count.total.read() > int(wanted.samples)
    found = renderer.render(rays, count=count)
    assert found.samples == wanted.samples
    torch.testing.assert_close(found.color, wanted.color, rtol=0, atol=0)


@DEVICES
def test_invalid_rays_are_named(name: str) -> None:
    renderer, rays = scene_on(name)
    directions = rays.directions.clone()
    directions[11] *= 2
    bad = Rays(rays.origins, directions)
    count = renderer.count_samples(bad)
    with pytest.raises(InvalidRaysError, match="ray 11 has a direction that is not of unit length"):
        renderer.render(bad, count=count)


@DEVICES
def test_a_count_of_something_else_is_refused(name: str) -> None:
    renderer, rays = scene_on(name)
    count = renderer.count_samples(rays, True, 7)
    same = Rays(rays.origins, rays.directions)
    seed = torch.tensor(7, device=name)
    for given, jitter, of in ((same, True, 7), (rays, False, 7), (rays, True, 8), (rays, True, seed)):
        with pytest.raises(ValueError, match="count: was counted for other rays, or with another jitter or seed"):
            renderer.render(given, jitter=jitter, seed=of, count=count)


def test_fields_of_other_kinds_need_none() -> None:
    rays = make_rays(dtype=torch.float32)
    renderer = VolumeRenderer(lambda x: (x.square().sum(1), x.abs()), make_occupancy(0.5), RendererConfig(step=STEP))
    wanted = renderer.render(rays)
    count = renderer.count_samples(rays)
    assert count is None
    torch.testing.assert_close(renderer.render(rays, count=count).color, wanted.color, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
def test_counted_beside_other_work_a_render_does_not_wait_for_it(graphs: bool) -> None:
    scene, rays = smooth_scene(torch.float32, "cuda")
    renderer = VolumeRenderer(scene.field, OccupancyGrid(resolution=8).cuda(), RendererConfig(step=STEP, graphs=graphs))
    for k in range(6):
        renderer.render(rays, jitter=True, seed=k).color.sum().backward()
    wanted = with_gradients(renderer, rays, jitter=True, seed=99)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # a second
    before = torch.cuda.current_stream().record_event()
    with torch.cuda.stream(stream):
        count = renderer.count_samples(rays, True, 99)
    found = with_gradients(renderer, rays, jitter=True, seed=99, count=count)
    assert not before.query()
    assert bool(renderer._graphs._graphs) == graphs
    assert_equal(found, wanted, 1e-5)


@pytest.mark.gpu
def test_it_cannot_be_captured() -> None:
    renderer, rays = scene_on("cuda")
    count = renderer.count_samples(rays)
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(first), pytest.raises(RuntimeError, match="count_samples: cannot be captured"):
        renderer.count_samples(rays)
    with torch.cuda.graph(second), pytest.raises(RuntimeError, match="count: cannot be given in a CUDA graph"):
        renderer.render(rays, count=count)


def test_a_known_number_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer, rays = scene_on("cpu")
    renderer.render(rays)
    count = renderer.count_samples(rays)

    def refuse(*_: Any) -> None:
        raise AssertionError("counted again")

    monkeypatch.setattr(SampleTotal, "__init__", refuse)
    assert renderer.render(rays, count=replace(count)).samples == count.total.read()
