"""Intervals through levels of a grid: native core against the twin, and against the rules written out per ray."""

from __future__ import annotations

import math

import pytest
import torch
from marching import assert_same, make_rays
from torch import Tensor

from dreamfusion_fast.ops import march, occupancy_pack, ray_box, traverse, traverse_reference
from dreamfusion_fast.ops.traverse import only_rays

# Not cubes, and neither nested nor sorted by size; the last one lies apart.
BOXES = [(-0.4, -0.5, -0.3, 0.5, 0.4, 0.6), (-1.0, -1.2, -0.9, 0.2, 1.0, 1.1), (1.2, -0.5, -0.5, 2.0, 0.5, 0.5)]
STEPS = [
    (0.1, 0.0, math.inf),
    (0.013, 0.0, math.inf),
    (0.02, 0.05, math.inf),
    (0.01, 0.3, 0.08),
    (0.0, 0.0, math.inf),
    (-1.0, 0.0, math.inf),
]


def scene(
    n: int, shape: tuple[int, ...], share: float, dtype: torch.dtype, device: torch.device, levels: int = 3
) -> tuple[Tensor, ...]:
    """Rays around the boxes, some along the axes, with starts and ends of their own; boxes and cells."""
    origins, directions = make_rays(n, dtype, device, spread=0.6)
    generator = torch.Generator().manual_seed(n)
    t_near = (torch.rand(n, generator=generator, dtype=torch.float64) - 0.2).to(device, dtype)
    t_far = (3 * torch.rand(n, generator=generator, dtype=torch.float64) + 0.5).to(device, dtype)
    t_near[::3], t_far[1::3] = 0.0, math.inf
    occupied = (torch.rand(levels, *shape, generator=generator) < share).to(device)
    return origins, directions, t_near, t_far, torch.tensor(BOXES[:levels], dtype=dtype, device=device), occupied


@pytest.mark.quick(16)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "shape"), [(0, (3, 3, 3)), (1, (1, 1, 1)), (113, (5, 9, 17)), (1023, (32, 24, 40))])
@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_equals_visiting_every_step(
    steps: tuple[float, ...], n: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    for share, limit in ((0.3, None), (0.01, None), (0.3, 4)):
        arguments = (*scene(n, shape, share, dtype, device), *steps, limit)
        found = traverse(*arguments)
        assert_same(found, traverse_reference(*arguments))
        assert n < 100 or share < 0.1 or found[1].shape[0] > n / 4


def written_out(
    origin: list[float],
    direction: list[float],
    near: float,
    far: float,
    boxes: list[tuple[float, ...]],
    occupied: Tensor,
    step: float,
    cone_angle: float,
    max_step: float,
) -> list[tuple[float, float]]:
    """The intervals of one ray by the rules alone, in Python's doubles."""
    found, t = [], near
    for _ in range(2000):
        dt = min(max(t * cone_angle, step), max_step)
        middle = t + dt / 2
        if middle >= far:
            break
        point = [o + middle * d for o, d in zip(origin, direction, strict=True)]
        for level, box in enumerate(boxes):
            if all(low <= x < high for x, low, high in zip(point, box[:3], box[3:], strict=True)):
                cell = [
                    int((x - low) / (high - low) * size)
                    for x, low, high, size in zip(point, box[:3], box[3:], occupied.shape[1:], strict=True)
                ]
                if bool(occupied[(level, *cell)]):
                    found.append((t, t + dt))
                break
        t += dt
    return found


@pytest.mark.parametrize("steps", STEPS[:4], ids=str)
def test_equals_the_rules_written_out(steps: tuple[float, ...]) -> None:
    arguments = scene(60, (5, 4, 6), 0.4, torch.float64, torch.device("cpu"))
    origins, directions, t_near, t_far, _, occupied = arguments
    offsets, t_starts, t_ends, ray_indices, _ = traverse(*arguments, *steps)
    assert offsets[-1] > 20
    for ray in range(60):
        wanted = written_out(
            origins[ray].tolist(),
            directions[ray].tolist(),
            float(t_near[ray]),
            float(t_far[ray]),
            BOXES,
            occupied,
            *steps,
        )
        mine = slice(int(offsets[ray]), int(offsets[ray + 1]))
        found = torch.stack([t_starts[mine], t_ends[mine]], dim=1)
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64).view(-1, 2), rtol=0, atol=1e-12)
        assert (ray_indices[mine] == ray).all()


def test_one_level_and_equal_steps_are_a_march(device: torch.device) -> None:
    origins, directions = make_rays(257, torch.float32, device)
    grid = (torch.rand(16, 16, 16) < 0.2).to(device)
    box = torch.tensor([-1.0, -1, -1, 1, 1, 1], device=device)
    t_near, t_far = ray_box(origins, directions, box)
    marched = march(origins, directions, t_near, t_far, box, occupancy_pack(grid.float(), 0.5), 16, 0.03)
    offsets, t_starts, t_ends, rays, ends = traverse(origins, directions, t_near, t_far, box[None], grid[None], 0.03)
    assert torch.equal(offsets, marched[0])
    assert torch.equal(rays, marched[2])
    torch.testing.assert_close((t_starts + t_ends) / 2, marched[1], rtol=0, atol=1e-6)
    assert torch.equal(ends, t_far)


def test_one_interval_for_each_crossed_cell_by_hand(device: torch.device) -> None:
    """A coarse level with a fine one inside of one of its cells."""
    coarse, fine = torch.ones(2, 2, 2, dtype=torch.bool), torch.ones(2, 2, 2, dtype=torch.bool)
    fine[1, 1, 1] = False
    boxes = torch.tensor([[-0.75, -0.75, -0.75, -0.25, -0.25, -0.25], [-1.0, -1, -1, 1, 1, 1]], device=device)
    origins = torch.tensor([[-3.0, -0.3, -0.3], [-3.0, -0.6, -0.6], [0.5, 0.5, -0.5]], device=device)
    directions = torch.tensor([[1.0, 0, 0], [2.0, 0, 0], [0, 0, -1.0]], device=device)
    far = torch.full((3,), math.inf, device=device)
    occupied = torch.stack([fine, coarse]).to(device)
    offsets, t_starts, t_ends, *_ = traverse(origins, directions, torch.zeros_like(far), far, boxes, occupied, 0.0)
    # Of the first ray the fine level's second cell is empty, and hides the coarse cell that it lies in.
    assert offsets.tolist() == [0, 4, 9, 10]
    wanted = [(2.0, 2.25), (2.25, 2.5), (2.75, 3.0), (3.0, 4.0), (1.0, 1.125), (1.125, 1.25), (1.25, 1.375)]
    wanted += [(1.375, 1.5), (1.5, 2.0), (0.0, 0.5)]
    torch.testing.assert_close(torch.stack([t_starts, t_ends], dim=1).cpu(), torch.tensor(wanted), rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", STEPS[:5], ids=str)
def test_going_on_where_the_limit_stopped(steps: tuple[float, ...], device: torch.device) -> None:
    """In parts, a ray has the intervals that it has at once; a finished one has no more."""
    origins, directions, t_near, t_far, boxes, occupied = scene(113, (9, 8, 7), 0.3, torch.float64, device)
    offsets, t_starts, t_ends, *_ = traverse(origins, directions, t_near, t_far, boxes, occupied, *steps)
    starts, ends = [[] for _ in range(113)], [[] for _ in range(113)]
    going = t_near
    for _ in range(200):
        part = traverse(origins, directions, going, t_far, boxes, occupied, *steps, limit=7)
        going = part[4]
        for ray, start, end in zip(part[3].tolist(), part[1].tolist(), part[2].tolist(), strict=True):
            starts[ray].append(start)
            ends[ray].append(end)
        if part[1].shape[0] == 0:
            break
    assert [len(x) for x in starts] == offsets.diff().tolist()
    assert torch.equal(going, t_far)
    for whole, parts in ((t_starts, starts), (t_ends, ends)):
        flat = torch.tensor([x for ray in parts for x in ray], dtype=torch.float64)
        torch.testing.assert_close(whole.cpu(), flat, rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", STEPS[:5], ids=str)
def test_rays_without_intervals(steps: tuple[float, ...], device: torch.device) -> None:
    inf, nan = math.inf, math.nan
    starts = torch.tensor([inf, nan, -inf, 0.0, 0.5, 0.0, 0.0, 0.0], device=device)
    ends = torch.tensor([inf, 1.0, 1.0, nan, 0.4, inf, inf, inf], device=device)
    origins = torch.zeros(8, 3, device=device)
    directions = torch.tensor([[0.0, 0.0, 1.0]], device=device).repeat(8, 1)
    directions[5], directions[6], origins[7, 0] = 0.0, nan, inf
    occupied = torch.ones(1, 4, 4, 4, dtype=torch.bool, device=device)
    arguments = (origins, directions, starts, ends, torch.tensor(BOXES[:1], device=device), occupied, *steps)
    found = traverse(*arguments)
    assert found[0].tolist() == [0] * 9
    assert torch.equal(found[4].nan_to_num(nan=5.0), ends.nan_to_num(nan=5.0))


def test_masked_rays(device: torch.device) -> None:
    origins, directions, t_near, t_far, *grid = scene(113, (9, 8, 7), 0.5, torch.float32, device)
    mask = torch.arange(113, device=device) % 2 == 0
    every = traverse(origins, directions, t_near, t_far, *grid, 0.05)
    some = traverse(origins, directions, t_near, only_rays(t_far, mask), *grid, 0.05)
    kept = mask[every[3].long()]
    assert torch.equal(some[1], every[1][kept])
    assert torch.equal(some[3], every[3][kept])


def test_a_box_without_extent_holds_nothing(device: torch.device) -> None:
    origins, directions, t_near, t_far, boxes, occupied = scene(113, (5, 5, 5), 0.5, torch.float32, device)
    turned = boxes.clone()
    turned[1, 0], turned[2, 3] = boxes[1, 3], boxes[2, 0]
    for step in (0.05, 0.0):
        found = traverse(origins, directions, t_near, t_far, turned, occupied, step)
        expected = traverse(origins, directions, t_near, t_far, boxes[:1], occupied[:1], step)
        assert_same(found, expected)
        assert_same(found, traverse_reference(origins, directions, t_near, t_far, turned, occupied, step))


def test_strided_arguments(device: torch.device) -> None:
    origins, directions, t_near, t_far, boxes, occupied = scene(113, (5, 6, 7), 0.4, torch.float32, device)
    turned = (x.t().contiguous().t() for x in (origins, directions))
    twice = (torch.stack([x, x], dim=1)[:, 0] for x in (t_near, t_far))
    strided = (*turned, *twice, boxes.t().contiguous().t(), occupied.transpose(0, 3).contiguous().transpose(0, 3))
    expected = traverse(origins, directions, t_near, t_far, boxes, occupied, 0.02, 0.01)
    assert_same(traverse(*strided, 0.02, 0.01), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [STEPS[0], STEPS[3], STEPS[4]], ids=str)
def test_opcheck(steps: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> None:
    arguments = (*scene(7, (3, 4, 5), 0.5, dtype, device), *steps, 9)
    torch.library.opcheck(torch.ops.dreamfusion_fast.traverse.default, arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"origins": torch.rand(3, 2)}, ValueError, r"origins must have shape \[n_rays, 3\], got \[3, 2\]"),
        ({"t_near": 0.0}, TypeError, r"t_near must be a torch.Tensor, got 0.0"),
        ({"boxes": torch.rand(6)}, ValueError, r"boxes must have shape \[L, 6\]"),
        ({"occupied": torch.ones(1, 4, 4, 4)}, TypeError, "occupied must be torch.bool, got torch.float32"),
        ({"occupied": torch.ones(2, 4, 4, 4).bool()}, ValueError, "occupied has 2 rows, boxes has 1"),
        ({"occupied": torch.ones(1, 0, 4, 4).bool()}, ValueError, "occupied must have 1 to"),
        ({"step": math.nan}, ValueError, "step must be 0 or less, or positive and finite, got nan"),
        ({"step": math.inf}, ValueError, "step must be 0 or less, or positive and finite, got inf"),
        ({"cone_angle": -0.1}, ValueError, "cone_angle must be 0 or more, and finite, got -0.1"),
        ({"max_step": 0.01}, ValueError, "max_step must be step or more, got 0.01"),
        ({"limit": 0}, ValueError, "limit must be between 1 and"),
        ({"limit": 1.5}, TypeError, "limit must be between 1 and"),
    ],
)
def test_wrong_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {
        "origins": torch.rand(3, 3),
        "directions": torch.rand(3, 3),
        "t_near": torch.zeros(3),
        "t_far": torch.ones(3),
        "boxes": torch.tensor(BOXES[:1]),
        "occupied": torch.ones(1, 4, 4, 4).bool(),
        "step": 0.1,
    }
    with pytest.raises(error, match=f"traverse: {message}"):
        traverse(**{**arguments, **change})  # type: ignore[arg-type]
