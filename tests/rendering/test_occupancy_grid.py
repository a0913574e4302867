"""OccupancyGrid: schedule, values, threshold, bitfield, state."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.rendering import OccupancyGrid
from dreamfusion_fast.rendering.occupancy import _most_chosen


class Ball:
    """Density 50 inside a ball of radius 0.5 around (0.2, 0, 0); remembers how many points were asked for."""

    def __init__(self) -> None:
        self.asked: list[Tensor] = []

    def density(self, positions: Tensor) -> Tensor:
        self.asked.append(positions)
        centre = torch.tensor([0.2, 0, 0], device=positions.device)
        return 50.0 * ((positions - centre).norm(dim=1) < 0.5)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.density(positions), positions


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("resolution", [1, 7, 16])
def test_starts_full(resolution: int, backend: str) -> None:
    grid = OccupancyGrid(resolution=resolution, backend=backend)
    assert grid.occupied().all()
    assert grid.occupied().shape == (resolution,) * 3
    assert grid.bitfield.shape == ((resolution**3 + 7) // 8,)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_finds_the_ball(device: torch.device, backend: str) -> None:
    grid = OccupancyGrid(resolution=17, backend=backend).to(device)
    assert grid.update(Ball(), step=0)
    axis = (torch.arange(17, device=device) + 0.5) / 17 * 2 - 1
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    distance = torch.stack([x - 0.2, y, z], dim=-1).norm(dim=-1)
    reach = math.sqrt(3) / 17
    occupied = grid.occupied()
    assert occupied[distance < 0.5 - reach].all()
    assert not occupied[distance > 0.5 + reach].any()
    assert 0 < grid.occupied_fraction() < 0.2


def test_points_lie_in_their_cells() -> None:
    box = (0.0, -1.0, 2.0, 1.0, 1.0, 6.0)
    grid, ball = OccupancyGrid(box, resolution=5), Ball()
    grid.update(ball, step=0)
    (points,) = ball.asked
    low, high = grid.aabb[:3], grid.aabb[3:]
    cells = ((points - low) / (high - low) * 5).floor().long()
    index = torch.arange(125)
    assert torch.equal(cells, torch.stack([index // 25, index // 5 % 5, index % 5], dim=1))


def test_schedule() -> None:
    grid, ball = OccupancyGrid(resolution=12, every=4, warmup_steps=8), Ball()
    updated = [step for step in range(17) if grid.update(ball, step)]
    assert updated == [0, 4, 8, 12, 16]
    counts = [len(points) for points in ball.asked]
    cells = 12**3
    assert counts[:2] == [cells, cells]
    occupied = int(grid.occupied().sum())
    for count in counts[2:]:
        # A quarter uniformly, and all of the occupied, which are fewer than a quarter.
        expected = 0.25 * cells + 0.75 * occupied
        assert abs(count - expected) < 5 * math.sqrt(cells * 0.25 * 0.75)


@pytest.mark.gpu
@pytest.mark.parametrize("cascades", [1, 2])
@pytest.mark.parametrize("occupied", [0.0, 0.1, 0.25, 1.0])
def test_an_update_on_a_gpu_does_not_wait(cascades: int, occupied: float) -> None:
    """It asks for as many points as there can be, and changes the chosen cells only: about as many as on a CPU."""
    cells = cascades * 32**3
    changed = {}
    for device in ("cpu", "cuda"):
        grid = OccupancyGrid(resolution=32, cascades=cascades, every=1, warmup_steps=0, decay=1.0).to(device)
        grid.set_occupied(torch.rand(grid.grid.shape, generator=torch.Generator().manual_seed(70)) < occupied)
        torch.cuda.set_sync_debug_mode("error")
        try:
            grid.update(lambda x: (torch.full((len(x),), 1e3, device=x.device), x), 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        changed[device] = int((grid.grid == 1e3).sum())
    share = 0.25 + 0.75 * min(occupied, 0.25)
    for count in changed.values():
        assert abs(count - share * cells) < 5 * math.sqrt(cells * 0.25)
    assert (grid.grid[grid.grid != 1e3] < 1e3).all()


@pytest.mark.parametrize("count", [1, 27, 64**3])
def test_the_most_that_an_update_chooses(count: int) -> None:
    """At the share of occupied cells at which the mean is largest."""
    generator = torch.Generator().manual_seed(3)
    occupied = torch.arange(count) < math.ceil(0.25 * count)
    for _ in range(20):
        draws = torch.rand(2, count, generator=generator)
        assert int(((draws[0] < 0.25) | (occupied & (draws[1] < 1.0))).sum()) <= _most_chosen(count) <= count


def test_decays_and_keeps_the_maximum() -> None:
    grid = OccupancyGrid(resolution=6, decay=0.5, every=1, warmup_steps=100)
    value = {"density": 8.0}

    def field(positions: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full((positions.shape[0],), value["density"]), positions

    grid.update(field, 0)
    assert (grid.grid == 8).all()
    value["density"] = 1.0
    grid.update(field, 1)
    assert (grid.grid == 4).all()
    value["density"] = 3.0
    grid.update(field, 2)
    assert (grid.grid == 3).all()


@pytest.mark.quick(10)
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("value", [math.inf, 1e30, 1e300, math.nan, -math.inf])
@pytest.mark.parametrize("decay", [0.5, 0.0])
@pytest.mark.parametrize("warmup_steps", [100, 0])
def test_what_is_infinite_decays_like_what_is_opaque(
    backend: str, value: float, decay: float, warmup_steps: int
) -> None:
    """Whether a field gave it or a checkpoint holds it, and whichever cells are updated."""
    grid = OccupancyGrid(resolution=5, decay=decay, every=1, warmup_steps=warmup_steps, backend=backend)

    def field(positions: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(positions[:, 0] < 0.0, torch.tensor(given, dtype=torch.float64), 0.1), positions

    opaque = 17.0 / grid.step_size
    given = value
    grid.update(field, 0)
    if value == value:
        assert float(grid.grid.max()) == pytest.approx(opaque if value > 0.0 else 0.1)
    grid.grid[0, :2] = math.inf
    grid.grid[0, 2:] = math.nan
    given = 0.1
    for step in range(1, 120):
        grid.update(field, step)
        assert (grid.grid <= opaque).all()
    torch.testing.assert_close(grid.grid, torch.full_like(grid.grid, 0.1))
    assert grid.occupied().all()


def test_a_uniform_haze_stays_occupied_and_nothing_becomes_empty() -> None:
    grid = OccupancyGrid(resolution=6)
    grid.update(lambda x: (torch.full((len(x),), 0.3), x), 0)
    assert grid.occupied().all()
    empty = OccupancyGrid(resolution=6)
    empty.update(lambda x: (torch.zeros(len(x)), x), 0)
    assert not empty.occupied().any()


def test_threshold_is_the_opacity_of_a_step() -> None:
    grid = OccupancyGrid(resolution=4, alpha_threshold=0.01, step_size=0.02)
    grid.grid.fill_(1e3)
    assert 1 - math.exp(-float(grid.threshold) * 0.02) == pytest.approx(0.01, rel=1e-5)
    grid.grid.fill_(1e-3)
    assert float(grid.threshold) < 1e-3


def test_seeds_and_resuming() -> None:
    def run(seed: int, stop: int = 40) -> OccupancyGrid:
        grid = OccupancyGrid(resolution=9, warmup_steps=8, every=4, seed=seed)
        for step in range(stop):
            grid.update(Ball(), step)
        return grid

    full = run(1)
    assert torch.equal(full.grid, run(1).grid)
    assert not torch.equal(full.grid, run(2).grid)
    resumed = OccupancyGrid(resolution=9, warmup_steps=8, every=4, seed=1)
    resumed.load_state_dict(run(1, stop=20).state_dict())
    for step in range(20, 40):
        resumed.update(Ball(), step)
    assert torch.equal(resumed.grid, full.grid)
    assert torch.equal(resumed.bitfield, full.bitfield)


def test_set_occupied() -> None:
    grid = OccupancyGrid(resolution=5)
    wanted = torch.rand(5, 5, 5) < 0.3
    grid.set_occupied(wanted)
    assert torch.equal(grid.occupied(), wanted)
    with pytest.raises(ValueError, match=r"occupied: got shape \[5\]"):
        grid.set_occupied(torch.ones(5))


def shell(positions: Tensor) -> Tensor:
    """Alphas of a sphere of radius 0.5, as a signed distance gives them: opaque at its surface, nothing elsewhere."""
    return torch.exp(-(((positions.norm(dim=1) - 0.5) / 0.05) ** 2))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_alphas_are_held_as_they_are(device: torch.device, backend: str) -> None:
    for step_size in (None, 1e-3, 10.0):
        grid = OccupancyGrid(resolution=17, quantity="alpha", step_size=step_size, backend=backend).to(device)
        assert grid.update(shell, 0)
        asked: list[Tensor] = []
        again = OccupancyGrid(resolution=17, quantity="alpha", backend=backend).to(device)
        again.update(lambda x, seen=asked: seen.append(x) or shell(x), 0)
        alphas = shell(torch.cat(asked))
        assert torch.equal(grid.grid.flatten(), alphas)
        assert float(grid.threshold) == pytest.approx(min(0.99 * float(alphas.mean()), 0.01), rel=1e-6)
        assert torch.equal(grid.occupied().flatten(), alphas > grid.threshold)
        assert 0.05 < grid.occupied_fraction() < 0.5


def test_alphas_decay_and_are_bounded() -> None:
    grid = OccupancyGrid(resolution=6, decay=0.5, every=1, quantity="alpha")
    for given, held in ((math.inf, 1.0), (0.1, 0.5), (math.nan, 0.25), (2.0, 1.0), (0.0, 0.5)):
        grid.update(lambda x, value=given: torch.full((len(x),), value), 0)
        torch.testing.assert_close(grid.grid, torch.full_like(grid.grid, held))
    # Its alphas are those of the renderer's steps, whatever these are.
    bits, threshold = grid.bitfield.clone(), float(grid.threshold)
    grid.keep_for_step(5.0)
    assert torch.equal(grid.bitfield, bits)
    assert float(grid.threshold) == threshold == pytest.approx(0.01)
    wanted = torch.rand(6, 6, 6) < 0.3
    grid.set_occupied(wanted)
    assert torch.equal(grid.occupied(), wanted)
    assert torch.equal(grid.grid > grid.threshold, wanted)


def test_alphas_of_the_renderers_step_leave_the_cells_that_densities_leave() -> None:
    """With the same random points and decays, and a density that the mean does not decide upon."""
    step = 0.02

    def density(positions: Tensor) -> Tensor:
        return 20.0 * shell(positions)

    by_density = OccupancyGrid(resolution=16, step_size=step)
    by_alpha = OccupancyGrid(resolution=16, step_size=step, quantity="alpha")
    by_density.update(lambda x: (density(x), x), 0)
    by_alpha.update(lambda x: -torch.expm1(-step * density(x)), 0)
    assert float(by_density.threshold) == pytest.approx(by_density.density_threshold, rel=1e-6)
    assert torch.equal(by_density.occupied(), by_alpha.occupied())


def test_what_is_no_alpha_is_named() -> None:
    grid = OccupancyGrid(resolution=4, quantity="alpha")
    with pytest.raises(TypeError, match=r"^field: returned tuple, want a tensor of alphas \[m\]"):
        grid.update(Ball(), 0)
    assert grid.update(lambda x: torch.ones(len(x), 1), 0)
    needing = partial(torch.zeros_like)  # any callable that can have attributes
    needing.needs = ("positions", "t_starts")
    with pytest.raises(TypeError, match=r"^field: got partial, which needs positions, t_starts, for a grid of alphas"):
        grid.update(needing, 0)
    with pytest.raises(ValueError, match=r"^field: returned alphas \[64, 2\], want \[64\]"):
        grid.update(lambda x: x[:, :2], 0)
    assert grid.occupied().all()


def test_a_grid_knows_whether_its_step_was_given() -> None:
    assert OccupancyGrid(step_size=0.01).step_is_given
    grid = OccupancyGrid()
    assert not grid.step_is_given
    grid.keep_for_step(1.0)
    assert not grid.step_is_given


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": 0}, "resolution: got 0"),
        ({"every": 0}, "every: got 0"),
        ({"decay": 1.5}, "decay: got 1.5"),
        ({"alpha_threshold": 0.0}, "alpha_threshold: got 0.0"),
        ({"step_size": 0.0}, "step_size: got 0.0"),
        ({"step_size": math.inf}, "step_size: got inf"),
        ({"step_size": math.nan}, "step_size: got nan"),
        ({"backend": "gpu"}, "backend: got 'gpu'"),
        ({"quantity": "sdf"}, "quantity: got 'sdf', want density or alpha"),
    ],
)
def test_bad_settings_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OccupancyGrid(**change)


class Everywhere:
    """Density 100 in a ball of radius 0.5 around (3, 0, 0), 0 elsewhere; remembers where it was asked."""

    def __init__(self) -> None:
        self.asked: list[Tensor] = []

    def density(self, positions: Tensor) -> Tensor:
        self.asked.append(positions)
        centre = torch.tensor([3.0, 0.0, 0.0], device=positions.device)
        return 100.0 * ((positions - centre).norm(dim=1) < 0.5)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.density(positions), positions


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_cascades_find_what_is_far_away(device: torch.device, backend: str) -> None:
    grid = OccupancyGrid(resolution=16, cascades=3, backend=backend).to(device)
    assert grid.outer_aabb.tolist() == [-4.0, -4.0, -4.0, 4.0, 4.0, 4.0]
    assert grid.grid.shape == grid.occupied().shape == (3, 16, 16, 16)
    assert grid.bitfield.shape == (3 * 16**3 // 8,)
    assert grid.occupied().all()
    assert grid.update(Everywhere(), step=0)
    occupied = grid.occupied()
    assert not occupied[:2].any()
    axis = (torch.arange(16, device=device) + 0.5) / 16 * 8 - 4
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    distance = torch.stack([x - 3, y, z], dim=-1).norm(dim=-1)
    reach = math.sqrt(3) / 4
    assert not occupied[2][distance > 0.5 + reach].any()
    assert occupied[2][distance < 0.5 - reach].all()
    assert int(occupied.sum()) > 0


def test_points_lie_in_the_cells_of_their_cascades() -> None:
    box = (0.0, -1.0, 2.0, 1.0, 1.0, 6.0)
    grid, field = OccupancyGrid(box, resolution=6, cascades=3), Everywhere()
    grid.update(field, step=0)
    (points,) = field.asked
    points = points.view(3, 6, 6, 6, 3)
    centre, half = 0.5 * (grid.aabb[:3] + grid.aabb[3:]), 0.5 * (grid.aabb[3:] - grid.aabb[:3])
    index = torch.stack(torch.meshgrid(*(torch.arange(6),) * 3, indexing="ij"), dim=-1)
    for cascade in range(3):
        cells = (((points[cascade] - centre) / (2**cascade * half) + 1) * 3).floor().long()
        assert torch.equal(cells, index)
    # Later, a part of them: every cell asked for is in the box of some cascade.
    grid.update(field, step=grid.warmup_steps)
    assert 0 < len(field.asked[-1]) < 3 * 6**3
    assert ((field.asked[-1] - centre).abs() <= 4 * half).all()


def test_one_cascade_is_what_there_was(device: torch.device) -> None:
    """Its state has the names and shapes of checkpoints written before there were cascades."""
    grid = OccupancyGrid(resolution=7).to(device)
    assert {name: list(tensor.shape) for name, tensor in grid.state_dict().items()} == {
        "aabb": [6],
        "grid": [7, 7, 7],
        "bitfield": [43],
    }
    assert torch.equal(grid.outer_aabb, grid.aabb)


def test_bad_cascades() -> None:
    with pytest.raises(ValueError, match="cascades: got 0, want at least 1"):
        OccupancyGrid(cascades=0)
    with pytest.raises(ValueError, match="resolution: got 7, want an even number with 2 cascades"):
        OccupancyGrid(resolution=7, cascades=2)
    with pytest.raises(ValueError, match=r"occupied: got shape \[4, 4, 4\], want \[2, 4, 4, 4\]"):
        OccupancyGrid(resolution=4, cascades=2).set_occupied(torch.ones(4, 4, 4, dtype=torch.bool))
