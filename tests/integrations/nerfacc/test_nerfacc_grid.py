"""Boxes and traversals by nerfacc's names, against float64 loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from grids import Interval, crossed_cells, expected_intervals, random_rays
from torch import Tensor

from dreamfusion_fast.integrations import nerfacc
from dreamfusion_fast.integrations.nerfacc.grid import _enlarge_aabb, _query, _ray_aabb_intersect

UNIT = torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
BOXES = {
    "one": UNIT[None],
    "nested": torch.stack([_enlarge_aabb(UNIT, 2.0**i) for i in range(3)]),
    "apart": torch.tensor([[-1, -1, -1, 0, 0.5, 1], [0.25, -1, -0.5, 1.25, 1, 0.5]], dtype=torch.float64),
    "overlapping": torch.tensor([[-1, -1, -1, 0.5, 0.5, 1], [-0.5, -1, -0.5, 1.25, 1, 0.75]], dtype=torch.float64),
}


def found(intervals: nerfacc.RayIntervals, samples: nerfacc.RaySamples) -> list[Interval]:
    """Ray, start and end of each interval, after a look at what both say of each other."""
    t_starts, t_ends = intervals.vals[intervals.is_left], intervals.vals[intervals.is_right]
    rays, valid = samples.ray_indices, samples.is_valid
    assert rays is not None
    assert valid is not None
    assert intervals.ray_indices is not None
    torch.testing.assert_close(samples.vals[valid], 0.5 * (t_starts + t_ends))
    assert torch.equal(intervals.ray_indices[intervals.is_left], rays[valid])
    assert torch.equal(intervals.ray_indices[intervals.is_right], rays[valid])
    for name, values, part in (("samples", samples, valid), ("intervals", intervals, intervals.is_left)):
        packed, indices = values.packed_info, values.ray_indices
        assert packed is not None
        assert packed.dtype == torch.int64
        assert indices is not None
        for ray, (first, count) in enumerate(packed.tolist()):
            own = slice(first, first + count)
            assert (indices[own] == ray).all(), name
            assert int(part[own].sum()) == int((rays[valid] == ray).sum()), name
    return list(zip(rays[valid].tolist(), t_starts.tolist(), t_ends.tolist(), strict=True))


def same(actual: list[Interval], expected: list[Interval], tolerance: float = 1e-9) -> None:
    assert [ray for ray, _, _ in actual] == [ray for ray, _, _ in expected]
    assert [t for _, *ts in actual for t in ts] == pytest.approx([t for _, *ts in expected for t in ts], abs=tolerance)


@pytest.mark.parametrize("cone_angle", [0.0, 0.05])
@pytest.mark.parametrize("boxes", BOXES)
def test_traverse_grids(boxes: str, cone_angle: float, device: torch.device) -> None:
    rays_o, rays_d = random_rays(11, device)
    occupied = torch.rand(len(BOXES[boxes]), 4, 5, 6) > 0.5
    near, far = [0.1 * i for i in range(11)], [math.inf] * 5 + [2.0 + 0.1 * i for i in range(6)]
    planes = [torch.tensor(x, dtype=torch.float64, device=device) for x in (near, far)]
    intervals, samples, ends = nerfacc.traverse_grids(
        rays_o, rays_d, occupied.to(device), BOXES[boxes].to(device), *planes, step_size=0.07, cone_angle=cone_angle
    )
    expected = expected_intervals(rays_o, rays_d, BOXES[boxes], occupied, near, far, 0.07, cone_angle)
    assert len(expected) > 20
    same(found(intervals, samples), expected)
    assert ends.shape == (11,)
    # Neighbours share an edge.
    joined = sum(a[0] == b[0] and abs(a[2] - b[1]) < 1e-12 for a, b in itertools.pairwise(expected))
    assert len(expected) <= intervals.vals.shape[0] <= 2 * len(expected)
    if cone_angle == 0.05:  # what is added up step by step is equal bit by bit
        assert intervals.vals.shape[0] == 2 * len(expected) - joined


@pytest.mark.parametrize("boxes", BOXES)
def test_one_interval_for_each_crossed_cell(boxes: str, device: torch.device) -> None:
    rays_o, rays_d = random_rays(11, device)
    occupied = torch.ones(len(BOXES[boxes]), 3, 3, 3, dtype=torch.bool)
    for step in (0.0, -1.0):
        intervals, samples, _ = nerfacc.traverse_grids(
            rays_o, rays_d, occupied.to(device), BOXES[boxes].to(device), step_size=step
        )
        actual = found(intervals, samples)
        expected = crossed_cells(rays_o, rays_d, BOXES[boxes], occupied)
        # Loops cut a ray at the planes of all boxes; joined again, both are the same parts of it.
        assert total(actual) == pytest.approx(total(expected), abs=1e-9)
        assert len(actual) <= len(expected)
        if len(BOXES[boxes]) == 1:
            same(actual, [interval for interval in expected if interval[2] - interval[1] > 1e-12])


def total(intervals: list[Interval]) -> list[float]:
    lengths = [0.0] * 11
    for ray, start, end in intervals:
        lengths[ray] += end - start
    return lengths


@pytest.mark.parametrize("over_allocate", [False, True])
@pytest.mark.parametrize("limit", [1, 7])
def test_a_traversal_in_parts_is_the_whole(limit: int, over_allocate: bool, device: torch.device) -> None:
    """As in nerfacc's test mode: a limit on the steps, and on from where a ray ended."""
    rays_o, rays_d = random_rays(7, device)
    occupied, boxes = (torch.rand(2, 4, 4, 4) > 0.4).to(device), BOXES["nested"][:2].to(device)
    whole = found(*nerfacc.traverse_grids(rays_o, rays_d, occupied, boxes, step_size=0.11)[:2])
    parts: list[Interval] = []
    near, mask = None, None
    for _ in range(200):
        intervals, samples, near = nerfacc.traverse_grids(
            rays_o,
            rays_d,
            occupied,
            boxes,
            near_planes=near,
            step_size=0.11,
            traverse_steps_limit=limit,
            over_allocate=over_allocate,
            rays_mask=mask,
        )
        if over_allocate:
            assert samples.vals.shape == (7 * limit,)
            assert intervals.vals.shape == (7 * limit * 2,)
        parts += found(intervals, samples)
        assert samples.packed_info is not None
        mask = samples.packed_info[:, 1] == limit
        if not mask.any():
            break
    same(sorted(parts), whole)


def test_rays_that_are_left_out(device: torch.device) -> None:
    rays_o, rays_d = random_rays(5, device)
    occupied, boxes = torch.ones(1, 2, 2, 2, dtype=torch.bool, device=device), UNIT[None].to(device)
    everything = found(*nerfacc.traverse_grids(rays_o, rays_d, occupied, boxes, step_size=0.1)[:2])
    mask = torch.tensor([True, False, True, False, True], device=device)
    near = torch.full((5,), 0.0, dtype=torch.float64, device=device)
    intervals, samples, ends = nerfacc.traverse_grids(
        rays_o, rays_d, occupied, boxes, near, step_size=0.1, rays_mask=mask
    )
    assert found(intervals, samples) == [interval for interval in everything if interval[0] % 2 == 0]
    assert ends[~mask].tolist() == [0.0, 0.0]


def test_no_rays_and_nothing_hit(device: torch.device) -> None:
    occupied, boxes = torch.ones(1, 2, 2, 2, dtype=torch.bool, device=device), UNIT[None].float().to(device)
    for n in (0, 3):
        away = torch.full((n, 3), 5.0, device=device)
        intervals, samples, ends = nerfacc.traverse_grids(away, away, occupied, boxes)
        assert found(intervals, samples) == []
        assert samples.packed_info is not None
        assert samples.packed_info.tolist() == [[0, 0]] * n
        assert ends.shape == (n,)


def test_ray_aabb_intersect(device: torch.device) -> None:
    low = torch.rand(13, 3, dtype=torch.float64) * 2 - 1
    boxes = torch.cat([low, low + 2 * torch.rand_like(low)], dim=1)
    rays_o, rays_d = torch.rand(17, 3, dtype=torch.float64) * 2 - 1, torch.randn(17, 3, dtype=torch.float64)
    rays_d[0], rays_d[1], rays_d[2, 2] = torch.tensor([1.0, 0, 0]), torch.tensor([0, -2.0, 0]), 0.0
    t_mins, t_maxs, hits = nerfacc.ray_aabb_intersect(*(x.to(device) for x in (rays_o, rays_d, boxes)))
    assert 10 < int(hits.sum()) < 200
    for ray in range(17):
        for box in range(13):
            enter, leave = -math.inf, math.inf
            for a in range(3):
                o, d, b = float(rays_o[ray, a]), float(rays_d[ray, a]), boxes[box].tolist()
                if d == 0:
                    inside = b[a] <= o <= b[a + 3]
                    enter, leave = (enter, leave) if inside else (math.inf, -math.inf)
                else:
                    near, far = sorted(((b[a] - o) / d, (b[a + 3] - o) / d))
                    enter, leave = max(enter, near), min(leave, far)
            hit = enter < leave and leave > 0
            assert bool(hits[ray, box]) == hit
            expected = (enter, leave) if hit else (math.inf, math.inf)
            assert (float(t_mins[ray, box]), float(t_maxs[ray, box])) == pytest.approx(expected, abs=1e-12)
    near, far, miss = nerfacc.ray_aabb_intersect(
        *(x.to(device) for x in (rays_o, rays_d, boxes)), near_plane=0.1, far_plane=0.4, miss_value=-7.0
    )
    assert torch.equal(near[hits], t_mins[hits].clamp(0.1, 0.4))
    assert torch.equal(far[hits], t_maxs[hits].clamp(0.1, 0.4))
    assert torch.equal(miss, hits)
    assert (near[~hits] == -7).all()


def test_the_torch_form_of_the_intersection_has_gradients() -> None:
    rays_o, rays_d = random_rays(3, torch.device("cpu"))
    given = (rays_o.requires_grad_(), rays_d.requires_grad_(), UNIT[None].clone().requires_grad_())
    hits = nerfacc.ray_aabb_intersect(*given)[2]
    assert hits.any()
    assert torch.autograd.gradcheck(lambda *x: tuple(t[hits] for t in _ray_aabb_intersect(*x)[:2]), given)


def test_query_takes_the_first_level_that_holds_a_place(device: torch.device) -> None:
    x = torch.rand(200, 3, dtype=torch.float64) * 10 - 5
    data = torch.rand(3, 4, 6, 8, dtype=torch.float64)
    values, inside = _query(x.to(device), data.to(device), UNIT.to(device))
    for i, place in enumerate(x.tolist()):
        expected = 0.0
        for level in range(3):
            half = 2.0**level
            cell = [(place[a] + half) / (2 * half) * data.shape[a + 1] for a in range(3)]
            if all(abs(c) <= half for c in place):
                expected = float(data[level, int(cell[0]), int(cell[1]), int(cell[2])])
                break
        assert float(values[i]) == expected
        assert bool(inside[i]) == (max(abs(c) for c in place) <= 4)
    corners = torch.stack([UNIT[:3], UNIT[3:]]).to(device)
    binaries = torch.ones(1, 2, 2, 2, dtype=torch.bool, device=device)
    values, inside = _query(corners, binaries, UNIT.to(device))
    assert values.tolist() == inside.tolist() == [True, True]


def given() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rays_o, rays_d = random_rays(3, torch.device("cpu"), torch.float32)
    return rays_o, rays_d, torch.ones(1, 2, 2, 2, dtype=torch.bool), UNIT[None].float()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o, d, b, a: nerfacc.traverse_grids(o[:, :2], d, b, a), "rays_o must have shape"),
        (
            lambda o, d, b, a: nerfacc.traverse_grids(o, d, b, a, over_allocate=True),
            "traverse_steps_limit must be above",
        ),
        (lambda o, d, b, a: nerfacc.traverse_grids(o, d, b, a, rays_mask=torch.ones(3)), "rays_mask must be"),
        (lambda o, d, b, a: nerfacc.traverse_grids(o, d, b.float(), a), "must be torch.bool"),
        (lambda o, d, b, a: nerfacc.traverse_grids(o, d, b, a.repeat(2, 1)), "rows"),
        (lambda o, d, b, a: nerfacc.ray_aabb_intersect(o, d[:2], a), "rays_d must have shape"),
        (lambda o, d, b, a: nerfacc.ray_aabb_intersect(o, d, a[0]), "aabbs must have shape"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(call: Callable[..., object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as error:
        call(*given())
    assert "\n" not in str(error.value)
