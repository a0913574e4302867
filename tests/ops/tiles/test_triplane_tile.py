"""Triplane over a tile: the functions against the twin, in every type and layout, and what they leave alone."""

from __future__ import annotations

import math

import pytest
import torch
from tile_cases import POISON, Place, assert_near, every_place, gpu_places, points_along_rays
from torch import Tensor

from dreamfusion_fast.ops.tiles import triplane as triplane_tile
from dreamfusion_fast.ops.tiles.triplane import (
    TriplaneTileLayout,
    derivative_before_scatter,
    derivative_before_scatter_reference,
    directional_derivative,
    directional_derivative_reference,
    encode,
    encode_reference,
    position_gradient,
    position_gradient_reference,
    scatter,
    scatter_reference,
)

SCENES, HEIGHT, WIDTH = 2, 6, 9
both_degrees = pytest.mark.parametrize("degree", [1, 2])


class Tile:
    """Arguments in a place's types, and what the twin makes of the same values in float64."""

    def __init__(
        self, place: Place, points: Tensor, degree: int = 2, features: int = 4, zeros: Tensor | None = None
    ) -> None:
        n, channels = points.shape[0], 3 * features
        runs = torch.randint(0, SCENES, (n // 5 + 1,), dtype=torch.int32)  # scenes change within a thread's samples
        scenes = runs.repeat_interleave(5)[:n].to(place.device)
        self.place, self.n, self.layout = place, n, TriplaneTileLayout(degree, scenes)
        shape = (SCENES, 3, HEIGHT, WIDTH, features)
        self.planes = torch.randn(shape, dtype=torch.float64).to(place.device, place.table)
        self.positions = place.tensor(points, place.scalar)
        direction = torch.randn(n, 3, dtype=torch.float64)
        grads, values = torch.randn(2, n, channels, dtype=torch.float64).unbind(0)
        if zeros is not None:  # [n, 3]: which samples lack which of them
            for x, without in zip((direction, grads, values), zeros.unbind(1), strict=True):
                x[without] = 0
        self.direction = place.tensor(direction, place.scalar)
        self.grads = place.tensor(grads, place.grads)
        self.values = place.tensor(values, place.features)
        self.features = place.buffer(n, channels, place.features)
        self.derivative = place.buffer(n, channels, place.grads)
        self.gradient = place.buffer(n, 3, place.scalar)
        self.grad_planes = torch.ones(shape, dtype=place.scalar, device=place.device)

    def run(self, count: Tensor | None = None, second_order: bool = True) -> None:
        """All four functions."""
        encode(self.positions, self.planes, self.layout, self.features, count)
        position_gradient(self.grads, self.positions, self.planes, self.layout, self.gradient, count)
        directional_derivative(self.direction, self.positions, self.planes, self.layout, self.derivative, count)
        second = (self.direction, self.values) if second_order else (None, None)
        scatter(self.grad_planes, self.positions, self.layout, self.grads, count, *second)

    def run_in_turn(self, count: Tensor | None = None, twin: bool = False) -> None:
        """The same with what `directional_derivative` has in common with `scatter` done once."""
        encode(self.positions, self.planes, self.layout, self.features, count)
        position_gradient(self.grads, self.positions, self.planes, self.layout, self.gradient, count)
        before = derivative_before_scatter_reference if twin else derivative_before_scatter
        place = (self.positions, self.planes, self.layout, self.derivative, count)
        second = before(self.direction, self.values, self.grad_planes, *place)
        last = scatter_reference if twin else scatter
        last(self.grad_planes, self.positions, self.layout, self.grads, count, *second)

    def results(self) -> list[Tensor]:
        return [self.features, self.gradient, self.derivative, self.grad_planes]

    def expected(self, live: int, second_order: bool = True) -> list[Tensor]:
        """The same results, as far as samples [0, live) go, by the twins in float64."""
        p, planes, direction = self.positions[:live].double(), self.planes.double(), self.direction.double()
        layout, grads, values = self.layout, self.grads.double(), self.values.double()
        features, gradient, derivative, grad_planes = (x.clone().double() for x in self.results())
        grad_planes.fill_(1)
        encode_reference(p, planes, layout, features)
        position_gradient_reference(grads, p, planes, layout, gradient)
        directional_derivative_reference(direction, p, planes, layout, derivative)
        second = (direction, values) if second_order else (None, None)
        scatter_reference(grad_planes, p, layout, grads, None, *second)
        return [features[:live], gradient[:live], derivative[:live], grad_planes]

    def check(self, live: int, second_order: bool = True) -> None:
        for actual, wanted in zip(self.results(), self.expected(live, second_order), strict=True):
            assert_near(actual[: wanted.shape[0]], wanted)
        for untouched in self.results()[:3]:
            assert (untouched[live:] == POISON).all()


@both_degrees
@pytest.mark.parametrize(("n", "features"), [(0, 4), (1, 3), (113, 1), (113, 24), (1023, 3), (1023, 4)])
@every_place
def test_matches_the_twin(place: Place, n: int, features: int, degree: int) -> None:
    tile = Tile(place, torch.rand(n, 3, dtype=torch.float64), degree, features)
    tile.run()
    tile.check(n)


@both_degrees
@every_place
def test_samples_that_share_cells(place: Place, degree: int) -> None:
    tile = Tile(place, points_along_rays(1023), degree)
    tile.run()
    tile.check(1023)


@both_degrees
@every_place
def test_one_scene_needs_no_numbers(place: Place, degree: int) -> None:
    tile = Tile(place, points_along_rays(113), degree)
    tile.layout = TriplaneTileLayout(degree)
    tile.run()
    tile.check(113)
    assert (tile.grad_planes[1] == 1).all()


@every_place
def test_a_cell_that_is_left_and_entered_again(place: Place) -> None:
    """Runs of each length from one to ten samples, alternating between two cells, whatever a thread takes."""
    a, b = torch.tensor([0.3, 0.4, 0.6], dtype=torch.float64), torch.tensor([0.8, 0.1, 0.2], dtype=torch.float64)
    runs = [(a if i % 2 else b).repeat(i, 1) for i in range(1, 11)]
    points = torch.cat(runs + runs[::-1])
    tile = Tile(place, points + 0.01 * torch.rand(len(points), 3, dtype=torch.float64))
    tile.run()
    tile.check(len(points))


@pytest.mark.parametrize("twin", [False, True])
@pytest.mark.parametrize("count", [None, 0, 60])
@every_place
def test_what_two_derivatives_share_is_done_once(place: Place, count: int | None, twin: bool) -> None:
    tile = Tile(place, torch.rand(113, 3, dtype=torch.float64))
    live = None if count is None else torch.tensor([count], dtype=torch.int32, device=place.device)
    tile.run_in_turn(live, twin)
    tile.check(113 if count is None else count)


@every_place
def test_samples_without_some_gradients(place: Place) -> None:
    """Each of the eight combinations of the two gradients and the direction, in any order."""
    tile = Tile(place, points_along_rays(1023), zeros=torch.rand(1023, 3) < 0.6)
    tile.run()
    tile.check(1023)


@every_place
def test_first_order_alone(place: Place) -> None:
    tile = Tile(place, points_along_rays(113))
    tile.run(second_order=False)
    tile.check(113, second_order=False)


@pytest.mark.parametrize("count", [-3, 0, 1, 112, 113, 4000])
@every_place
def test_only_so_many_samples_are_touched(place: Place, count: int) -> None:
    live = min(max(count, 0), 113)
    tile = Tile(place, points_along_rays(113))
    for beyond in (tile.positions, tile.grads, tile.values, tile.direction):
        beyond[live:] = math.nan
    assert tile.layout.scenes is not None
    tile.layout.scenes[live:] = 99
    tile.run(torch.tensor([count], dtype=torch.int32, device=place.device))
    tile.check(live)


@both_degrees
@every_place
def test_outside_is_clamped_and_has_no_gradient(place: Place, degree: int) -> None:
    outside = torch.tensor([[-0.5, 0.3, 0.6], [0.3, 1.25, 2.0], [math.inf, -math.inf, 0.5]], dtype=torch.float64)
    tile = Tile(place, outside, degree)
    tile.run()
    tile.check(3)
    inside = (outside >= 0) & (outside <= 1)
    assert torch.equal(tile.gradient.cpu() != 0, inside)


@every_place
def test_nan_position_gives_nan(place: Place) -> None:
    points = torch.rand(5, 3, dtype=torch.float64)
    points[2, 1] = math.nan
    tile = Tile(place, points)
    tile.run()
    for result in (tile.features, tile.gradient, tile.derivative):
        assert result.isnan().any(1).tolist() == [False, False, True, False, False]
    assert tile.features[2].isnan().tolist() == [True] * 4 + [False] * 4 + [True] * 4  # (x, z) knows nothing of y
    assert tile.grad_planes.isnan().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"planes": torch.rand(2, 3, 6, 9, 8)[..., ::2]}, "planes must be contiguous"),
        ({"planes": torch.rand(2, 3, 2, 9, 4)}, r"3 to 2\^14 vertices a side"),
        ({"features": torch.rand(113, 11)}, r"features must have at least 12 channels, got 11"),
        ({"layout": TriplaneTileLayout(1, torch.full((113,), 2, dtype=torch.int32))}, r"scenes must lie in \[0, 1\]"),
        ({"layout": TriplaneTileLayout(1, torch.zeros(9, dtype=torch.int32))}, r"scenes must have shape \[113\]"),
    ],
)
def test_wrong_arguments(change: dict[str, object], message: str) -> None:
    tile = Tile(Place("cpu", *[torch.float32] * 4, "rows"), torch.rand(113, 3, dtype=torch.float64))
    arguments = {"positions": tile.positions, "planes": tile.planes, "layout": tile.layout, "features": tile.features}
    with pytest.raises(ValueError, match=message):
        encode(**{**arguments, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("samples", [4, 8, 64])
@gpu_places
def test_any_number_of_samples_per_thread(place: Place, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triplane_tile, "SAMPLES_PER_THREAD", samples)
    tile = Tile(place, points_along_rays(1023))
    tile.run()
    tile.check(1023)


@pytest.mark.parametrize("scene", [-1, SCENES, 2**31 - 1])
@gpu_places
def test_a_scene_that_there_is_not_is_nan_and_touches_nothing(place: Place, scene: int) -> None:
    tile = Tile(place, points_along_rays(113))
    assert tile.layout.scenes is not None
    tile.layout.scenes.fill_(scene)
    tile.run()
    assert tile.features.isnan().all()
    assert tile.derivative.isnan().all()
    assert (tile.gradient == 0).all()
    assert (tile.grad_planes == 1).all()


@gpu_places
def test_a_graph_replays_with_another_count(place: Place) -> None:
    tile = Tile(place, points_along_rays(1023))
    count = torch.tensor([0], dtype=torch.int32, device=place.device)
    tile.run(count)  # loads the module
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tile.run(count)
    count.fill_(500)
    graph.replay()
    tile.check(500)


@gpu_places
def test_does_not_wait(place: Place) -> None:
    tile = Tile(place, points_along_rays(1023))
    count = torch.tensor([500], dtype=torch.int32, device=place.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tile.run(count)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tile.check(500)
