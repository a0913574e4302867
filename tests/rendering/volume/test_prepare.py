"""Prepared rays: the same render, and on a GPU one that nothing waits for, as its samples are counted ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from streaming_cases import EVERYTHING, LIGHT, STEP, assert_equal, make_field, make_occupancy, make_rays, smooth_scene
from torch import Tensor

from dreamfusion_fast.rendering import (
    InvalidRaysError,
    OccupancyGrid,
    PreparedRays,
    Rays,
    RendererConfig,
    RenderOutput,
    VolumeRenderer,
    orbit_cameras,
)
from dreamfusion_fast.rendering.volume.sample_count import SampleCount

DEVICES = pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
OPTIONS: dict[str, Any] = {"shading": "lambertian", **EVERYTHING}


def scene_on(name: str, **changes: Any) -> tuple[VolumeRenderer, Rays]:
    occupancy = make_occupancy(0.5).to(name)
    field = make_field(dtype=torch.float32).to(name)
    return VolumeRenderer(field, occupancy, RendererConfig(step=STEP, **changes)), make_rays().to(name, torch.float32)


def with_gradients(
    renderer: VolumeRenderer, rays: Rays | PreparedRays, **options: Any
) -> tuple[RenderOutput, dict[str, Tensor]]:
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
    wanted = with_gradients(renderer, rays, jitter=True, seed=7, **options)
    prepared = renderer.prepare(rays, jitter=True, seed=7)
    assert wanted[0].samples > 37
    if name == "cuda":
        assert prepared.count is not None
        assert prepared.count.read() == wanted[0].samples
    for _ in range(8):  # on a GPU the last ones are graphs
        assert_equal(with_gradients(renderer, prepared, **options), wanted, 1e-5)


@DEVICES
def test_cameras(name: str) -> None:
    renderer, _ = scene_on(name)
    cameras = orbit_cameras(2, device=name)
    for size in (9, (9, 5)):
        height, width = size if isinstance(size, tuple) else (size, size)
        wanted = renderer.render(cameras.rays(height, width))
        given = renderer.render(renderer.prepare(cameras, size))
        assert len(given.color) == 2 * height * width
        torch.testing.assert_close(given.color, wanted.color, rtol=0, atol=0)


def test_gradients_to_cameras_come_through() -> None:
    renderer, _ = scene_on("cpu")
    cameras = orbit_cameras(1)
    pose = cameras.camera_to_world.requires_grad_()
    renderer.render(renderer.prepare(cameras, 9)).opacity.sum().backward()
    assert pose.grad is not None
    assert float(pose.grad.abs().max()) > 1e-3


@DEVICES
def test_counts_of_several_renders_may_be_on_their_way(name: str) -> None:
    renderer, rays = scene_on(name)
    parts = [rays[:5], rays[5:23], rays[:0], rays[23:]]
    wanted = [renderer.render(part).samples for part in parts]
    prepared = [renderer.prepare(part) for part in parts]
    assert [renderer.render(part).samples for part in prepared] == wanted
    assert len(set(wanted)) == 4


@DEVICES
def test_early_stop_counts_by_itself(name: str) -> None:
    renderer, rays = scene_on(name, early_stop=0.5)
    wanted = renderer.render(rays)
    found = renderer.render(renderer.prepare(rays))
    assert found.samples == wanted.samples
    torch.testing.assert_close(found.color, wanted.color, rtol=0, atol=0)


@DEVICES
def test_invalid_rays_are_named(name: str) -> None:
    renderer, rays = scene_on(name)
    directions = rays.directions.clone()
    directions[11] *= 2
    prepared = renderer.prepare(Rays(rays.origins, directions))
    with pytest.raises(InvalidRaysError, match="ray 11 has a direction that is not of unit length"):
        renderer.render(prepared)


CHANGES: dict[str, Callable[[VolumeRenderer, Rays], Any]] = {
    "rays": lambda renderer, rays: rays.origins.mul_(0.9),
    "cells": lambda renderer, rays: renderer.occupancy.set_occupied(torch.ones_like(renderer.occupancy.occupied())),
    "bitfield": lambda renderer, rays: renderer.occupancy.bitfield.fill_(255),
    "box": lambda renderer, rays: renderer.occupancy.aabb.mul_(1.25),
    "nothing": lambda renderer, rays: None,
}


@DEVICES
@pytest.mark.parametrize("change", CHANGES)
def test_changes_in_between_are_seen(name: str, change: str) -> None:
    """A stale count would leave out samples."""
    renderer, rays = scene_on(name)
    prepared = renderer.prepare(rays)
    before = renderer.render(prepared).samples
    CHANGES[change](renderer, rays)
    found, wanted = renderer.render(prepared), renderer.render(Rays(rays.origins, rays.directions))
    assert found.samples == wanted.samples
    assert (found.samples == before) == (change == "nothing")
    torch.testing.assert_close(found.color, wanted.color, rtol=0, atol=1e-6)


@DEVICES
def test_another_renderer_counts_for_itself(name: str) -> None:
    renderer, rays = scene_on(name)
    other = VolumeRenderer(renderer.field, renderer.occupancy, RendererConfig(step=STEP / 2))
    assert other.render(renderer.prepare(rays)).samples == other.render(rays).samples


def test_wrong_arguments_are_named() -> None:
    renderer, rays = scene_on("cpu")
    with pytest.raises(ValueError, match="size: got 9 with Rays, want one for cameras, None for rays"):
        renderer.prepare(rays, 9)
    with pytest.raises(ValueError, match="size: got None with OrbitCameras"):
        renderer.prepare(orbit_cameras(1))
    with pytest.raises(ValueError, match="seed: got -1, want 0 <= seed"):
        renderer.prepare(rays, seed=-1)
    for options in ({"jitter": True}, {"seed": 1}, {"seed": torch.tensor(0)}):
        with pytest.raises(ValueError, match="jitter, seed: got values for prepared rays, want them in prepare"):
            renderer.render(renderer.prepare(rays), **options)


def test_fields_of_other_kinds_are_not_counted() -> None:
    rays = make_rays(dtype=torch.float32)
    renderer = VolumeRenderer(lambda x: (x.square().sum(1), x.abs()), make_occupancy(0.5), RendererConfig(step=STEP))
    prepared = renderer.prepare(rays)
    assert prepared.count is None
    torch.testing.assert_close(renderer.render(prepared).color, renderer.render(rays).color, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
def test_prepared_beside_other_work_a_render_does_not_wait_for_it(graphs: bool) -> None:
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
        prepared = renderer.prepare(rays, jitter=True, seed=99)
    found = with_gradients(renderer, prepared)
    assert not before.query()
    assert bool(renderer._graphs._graphs) == graphs
    assert_equal(found, wanted, 1e-5)


@pytest.mark.gpu
def test_a_captured_render_counts_at_each_replay() -> None:
    renderer, rays = scene_on("cuda")
    prepared = renderer.prepare(rays)
    renderer.render(prepared)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        inside = renderer.render(prepared)
        assert renderer.prepare(rays).count is None
    rays.origins.mul_(0.9)
    graph.replay()
    wanted = renderer.render(rays)
    assert int(inside.samples) == wanted.samples
    torch.testing.assert_close(inside.color, wanted.color, rtol=0, atol=1e-6)


@pytest.mark.gpu
def test_a_known_number_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer, rays = scene_on("cuda")
    renderer.render(rays)
    prepared = renderer.prepare(rays)
    assert prepared.count is not None

    def refuse(*_: Any) -> None:
        raise AssertionError("counted again")

    monkeypatch.setattr(SampleCount, "__init__", refuse)
    assert renderer.render(prepared).samples == prepared.count.read()
