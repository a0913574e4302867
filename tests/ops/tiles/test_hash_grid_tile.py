"""Hash grid over a tile: the four functions against the twin, in every type and layout, and what they leave alone."""

from __future__ import annotations

import math

import pytest
import torch
from tile_cases import POISON, Place, assert_near, every_place, gpu_places, points_along_rays
from torch import Tensor

from dreamfusion_fast.ops import hash_grid_layout
from dreamfusion_fast.ops.tiles import hash_grid as hash_grid_tile
from dreamfusion_fast.ops.tiles.buffers import check_span
from dreamfusion_fast.ops.tiles.hash_grid import (
    HashGridTileLayout,
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

# A dense level, one hashed into a power of two (a mask), one hashed into an odd number of rows (a division). The second
# and third start at odd rows, so that aligned pairs of rows are not those of even rows of the level.
RESOLUTIONS = [2, 4, 7]
ROWS = [27, 64, 77]


def layout_of(place: Place, smoothstep: bool = False) -> HashGridTileLayout:
    offsets = torch.tensor([0, *ROWS]).cumsum(0).to(place.device)
    resolutions = torch.tensor(RESOLUTIONS, dtype=torch.int32, device=place.device)
    return HashGridTileLayout(offsets, resolutions, smoothstep)


class Tile:
    """Arguments in a place's types, and what the twin makes of the same values in float64."""

    def __init__(
        self, place: Place, points: Tensor, layout: HashGridTileLayout, features: int = 2, zeros: Tensor | None = None
    ) -> None:
        n, channels = points.shape[0], layout.levels * features
        self.place, self.layout, self.n = place, layout, n
        n_rows = int(layout.level_offsets[-1])
        self.table = torch.randn(n_rows, features, dtype=torch.float64).to(place.device, place.table)
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
        self.grad_table = torch.ones(n_rows, features, dtype=place.scalar, device=place.device)

    def run(self, count: Tensor | None = None, second_order: bool = True) -> None:
        """All four functions."""
        encode(self.positions, self.table, self.layout, self.features, count)
        position_gradient(self.grads, self.positions, self.table, self.layout, self.gradient, count)
        directional_derivative(self.direction, self.positions, self.table, self.layout, self.derivative, count)
        second = (self.direction, self.values) if second_order else (None, None)
        scatter(self.grad_table, self.positions, self.layout, self.grads, count, *second)

    def run_in_turn(self, count: Tensor | None = None, twin: bool = False) -> None:
        """The same with what `directional_derivative` has in common with `scatter` done once."""
        encode(self.positions, self.table, self.layout, self.features, count)
        position_gradient(self.grads, self.positions, self.table, self.layout, self.gradient, count)
        before = derivative_before_scatter_reference if twin else derivative_before_scatter
        place = (self.positions, self.table, self.layout, self.derivative, count)
        second = before(self.direction, self.values, self.grad_table, *place)
        last = scatter_reference if twin else scatter
        last(self.grad_table, self.positions, self.layout, self.grads, count, *second)

    def results(self) -> list[Tensor]:
        return [self.features, self.gradient, self.derivative, self.grad_table]

    def expected(self, live: int, second_order: bool = True) -> list[Tensor]:
        """The same results, as far as samples [0, live) go, by the twins in float64."""
        p, table, direction = self.positions[:live].double(), self.table.double(), self.direction.double()
        layout, grads, values = self.layout, self.grads.double(), self.values.double()
        features, gradient, derivative, grad_table = (x.clone().double() for x in self.results())
        grad_table.fill_(1)
        encode_reference(p, table, layout, features)
        position_gradient_reference(grads, p, table, layout, gradient)
        directional_derivative_reference(direction, p, table, layout, derivative)
        scatter_reference(grad_table, p, layout, grads, None, *((direction, values) if second_order else (None, None)))
        return [features[:live], gradient[:live], derivative[:live], grad_table]

    def check(self, live: int, second_order: bool = True) -> None:
        for actual, wanted in zip(self.results(), self.expected(live, second_order), strict=True):
            assert_near(actual[: wanted.shape[0]], wanted)
        for untouched in self.results()[:3]:
            assert (untouched[live:] == POISON).all()


@pytest.mark.parametrize("smoothstep", [False, True])
@pytest.mark.parametrize(("n", "features"), [(0, 2), (1, 4), (113, 1), (113, 8), (1023, 2), (1023, 4)])
@every_place
def test_matches_the_twin(place: Place, n: int, features: int, smoothstep: bool) -> None:
    tile = Tile(place, torch.rand(n, 3, dtype=torch.float64), layout_of(place, smoothstep), features)
    tile.run()
    tile.check(n)


@pytest.mark.parametrize("smoothstep", [False, True])
@every_place
def test_samples_that_share_cells(place: Place, smoothstep: bool) -> None:
    tile = Tile(place, points_along_rays(1023), layout_of(place, smoothstep))
    tile.run()
    tile.check(1023)


@every_place
def test_a_cell_that_is_left_and_entered_again(place: Place) -> None:
    """Runs of each length from one to ten samples, alternating between two cells, whatever a thread takes."""
    a, b = torch.tensor([0.3, 0.4, 0.6], dtype=torch.float64), torch.tensor([0.8, 0.1, 0.2], dtype=torch.float64)
    runs = [(a if i % 2 else b).repeat(i, 1) for i in range(1, 11)]
    points = torch.cat(runs + runs[::-1])
    tile = Tile(place, points + 0.01 * torch.rand(len(points), 3, dtype=torch.float64), layout_of(place))
    tile.run()
    tile.check(len(points))


@pytest.mark.parametrize("twin", [False, True])
@pytest.mark.parametrize("count", [None, 0, 60])
@every_place
def test_what_two_derivatives_share_is_done_once(place: Place, count: int | None, twin: bool) -> None:
    tile = Tile(place, torch.rand(113, 3, dtype=torch.float64), layout_of(place))
    live = None if count is None else torch.tensor([count], dtype=torch.int32, device=place.device)
    tile.run_in_turn(live, twin)
    tile.check(113 if count is None else count)


@every_place
def test_samples_without_some_gradients(place: Place) -> None:
    """Each of the eight combinations of the two gradients and the direction, in any order."""
    n = 1023
    tile = Tile(place, points_along_rays(n), layout_of(place), zeros=torch.rand(n, 3) < 0.6)
    tile.run()
    tile.check(n)


@every_place
def test_first_order_alone(place: Place) -> None:
    tile = Tile(place, points_along_rays(113), layout_of(place, smoothstep=True))
    tile.run(second_order=False)
    tile.check(113, second_order=False)


@pytest.mark.parametrize("count", [-3, 0, 1, 112, 113, 4000])
@every_place
def test_only_so_many_samples_are_touched(place: Place, count: int) -> None:
    live = min(max(count, 0), 113)
    tile = Tile(place, points_along_rays(113), layout_of(place))
    for beyond in (tile.positions, tile.grads, tile.values, tile.direction):
        beyond[live:] = math.nan
    tile.run(torch.tensor([count], dtype=torch.int32, device=place.device))
    tile.check(live)


@every_place
def test_a_grid_as_it_is_used(place: Place) -> None:
    """16 levels and large steps between them; rounding of a position grows with the resolution."""
    offsets, resolutions = (x.to(place.device) for x in hash_grid_layout(16, 16, 256, 10))
    tile = Tile(place, points_along_rays(300), HashGridTileLayout(offsets, resolutions))
    tile.table.mul_(2**-4)  # a directional derivative grows with the resolution, too: float16 must hold it
    tile.run()
    for actual, wanted in zip(tile.results(), tile.expected(300), strict=True):
        scalar = torch.finfo(place.scalar).eps * 256
        epsilon = scalar + 0.51 * torch.finfo(actual.dtype).eps
        scale = max(1.0, wanted.abs().max().item())
        assert (actual.double() - wanted).abs().max().item() <= epsilon * scale


@every_place
def test_outside_is_clamped_and_has_no_gradient(place: Place) -> None:
    outside = torch.tensor([[-0.5, 0.3, 0.6], [0.3, 1.25, 2.0], [math.inf, -math.inf, 0.5]], dtype=torch.float64)
    tile = Tile(place, outside, layout_of(place))
    tile.run()
    tile.check(3)
    inside = (outside >= 0) & (outside <= 1)
    assert torch.equal(tile.gradient.cpu() != 0, inside)


@every_place
def test_nan_position_gives_nan(place: Place) -> None:
    points = torch.rand(5, 3, dtype=torch.float64)
    points[2, 1] = math.nan
    tile = Tile(place, points, layout_of(place))
    tile.run()
    for result in (tile.features, tile.gradient, tile.derivative):
        assert result.isnan().any(1).tolist() == [False, False, True, False, False]
    assert tile.features[2].isnan().all()
    assert tile.grad_table.isnan().any()


@pytest.mark.parametrize("at_once", [1, 2, 16])
@gpu_places
def test_any_number_of_levels_at_once(place: Place, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_grid_tile, "LEVELS_PER_THREAD", at_once)
    monkeypatch.setattr(hash_grid_tile, "LEVELS_PER_LAUNCH", at_once)
    monkeypatch.setattr(hash_grid_tile, "ENOUGH_THREADS", 1)
    tile = Tile(place, points_along_rays(113), layout_of(place))
    tile.run()
    tile.check(113)


@pytest.mark.parametrize("samples", [4, 8, 64])
@gpu_places
def test_any_number_of_samples_per_thread(place: Place, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_grid_tile, "SAMPLES_PER_THREAD", samples)
    tile = Tile(place, points_along_rays(1023), layout_of(place))
    tile.run()
    tile.check(1023)


@gpu_places
def test_level_outside_the_table_is_nan_and_touches_nothing(place: Place) -> None:
    tile = Tile(place, points_along_rays(113), layout_of(place))
    tile.layout.level_offsets[3] = 4000
    tile.run()
    for result in (tile.features, tile.derivative):
        assert result[:, 4:].isnan().all()
        assert result[:, :4].isfinite().all()
    assert tile.gradient.isfinite().all()
    assert (tile.grad_table[sum(ROWS[:2]) :] == 1).all()


@gpu_places
def test_a_graph_replays_with_another_count(place: Place) -> None:
    tile = Tile(place, points_along_rays(1023), layout_of(place, smoothstep=True))
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
    tile = Tile(place, points_along_rays(1023), layout_of(place))
    count = torch.tensor([500], dtype=torch.int32, device=place.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tile.run(count)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tile.check(500)


def test_fewer_levels_per_thread_for_few_samples() -> None:
    assert hash_grid_tile._levels_per_thread(2**19, 16) == hash_grid_tile.LEVELS_PER_THREAD
    assert hash_grid_tile._levels_per_thread(1000, 16) == 1
    assert hash_grid_tile._levels_per_thread(2**19, 3) == 3


CPU_PLACE = Place("cpu", *[torch.float64] * 4, "rows")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"positions": torch.rand(4, 2).double()}, ValueError, r"positions must have shape \[n_samples, 3\]"),
        ({"positions": torch.rand(4, 3)}, TypeError, "table must be torch.float32, got torch.float64"),
        ({"table": torch.rand(168, 3).double()}, ValueError, "table must have 1, 2, 4 or 8 columns"),
        ({"table": torch.rand(2, 168).double().t()}, ValueError, "table must be contiguous"),
        ({"table": torch.rand(167, 2).double()}, ValueError, "level_offsets must rise from 0"),
        ({"features": torch.rand(4, 5).double()}, ValueError, "features must have at least 6 channels, got 5"),
        ({"features": torch.rand(3, 6).double()}, ValueError, r"features must have shape \[4, levels"),
        ({"features": torch.rand(4, 6)}, TypeError, "features must be torch.float64, got torch.float32"),
        ({"count": torch.tensor([4])}, TypeError, "count must be torch.int32"),
        ({"count": torch.tensor(4, dtype=torch.int32)}, ValueError, r"count must have shape \[1\]"),
        ({"positions": torch.empty(1, 3).double().expand(2**24 + 1, 3)}, ValueError, r"at most 2\^24 samples"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    tile = Tile(CPU_PLACE, torch.rand(4, 3).double(), layout_of(CPU_PLACE))
    arguments = {"positions": tile.positions, "table": tile.table, "layout": tile.layout, "features": tile.features}
    with pytest.raises(error, match=message):
        encode(**{**arguments, **change})  # type: ignore[arg-type]


def test_strides_beyond_32_bits() -> None:
    """The planes of a buffer on the meta device, which has no memory."""
    planes = torch.empty(6, 2**30, dtype=torch.float64, device="meta")[:, :4].t()
    with pytest.raises(ValueError, match=r"features must span at most 2\^32 elements"):
        check_span("hash_grid_tile.encode", "features", planes)
    check_span("hash_grid_tile.encode", "features", planes[:, :4])


def test_wrong_arguments_of_the_derivatives() -> None:
    tile = Tile(CPU_PLACE, torch.rand(4, 3).double(), layout_of(CPU_PLACE))
    p, w, layout, short = tile.positions, tile.table, tile.layout, tile.direction[:3]
    with pytest.raises(ValueError, match=r"gradient must have shape \[4, 3\], got \[3, 3\]"):
        position_gradient(tile.grads, p, w, layout, short)
    with pytest.raises(ValueError, match=r"direction must have shape \[4, 3\], got \[3, 3\]"):
        directional_derivative(short, p, w, layout, tile.features)
    with pytest.raises(ValueError, match="direction and grad_of_features go together"):
        scatter(tile.grad_table, p, layout, tile.grads, direction=tile.direction)
    with pytest.raises(TypeError, match=r"grad_table must be torch\.float64, got torch\.float32"):
        scatter(tile.grad_table.float(), p, layout, tile.grads)
    with pytest.raises(TypeError, match=r"grad_table must be torch\.float64, got torch\.float32"):
        derivative_before_scatter(tile.direction, tile.values, tile.grad_table.float(), p, w, layout, tile.features)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"resolutions": torch.tensor(RESOLUTIONS)}, TypeError, "resolutions must be torch.int32"),
        ({"level_offsets": torch.zeros(3, dtype=torch.int64)}, ValueError, r"level_offsets must have shape \[4\]"),
        ({"level_offsets": torch.zeros(4, 2, dtype=torch.int64)[:, 0]}, ValueError, "level_offsets must be contiguous"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_layout(change: dict[str, object], error: type[Exception], message: str) -> None:
    layout = layout_of(CPU_PLACE)
    arguments = {"level_offsets": layout.level_offsets, "resolutions": layout.resolutions}
    with pytest.raises(error, match=message):
        HashGridTileLayout(**{**arguments, **change})  # type: ignore[arg-type]
