"""March through cascades of grids and along given distances: sample by sample what visiting every k finds."""

from __future__ import annotations

import math

import pytest
import torch
from marching import BOX, OTHER_BOX, assert_same, make_bits, make_rays
from torch import Tensor

from dreamfusion_fast.ops import (
    march,
    march_lattice,
    march_lattice_reference,
    march_reference,
    occupancy_pack,
    ray_box,
)
from dreamfusion_fast.ops.march import _march_lattice
from dreamfusion_fast.rendering import cone_distances


def outer_box(aabb: Tensor, cascades: int) -> Tensor:
    centre, half = 0.5 * (aabb[:3] + aabb[3:]), 2 ** (cascades - 2) * (aabb[3:] - aabb[:3])
    return torch.cat([centre - half, centre + half])


def scene(
    n: int, box: tuple[float, ...], cascades: int, dtype: torch.dtype, device: torch.device, near: float = 0.0
) -> tuple[Tensor, ...]:
    """Rays from everywhere in and around all cascades, cut to the last one's box."""
    origins, directions = make_rays(n, dtype, device)
    origins = origins * 2.0 ** torch.randint(-1, cascades, (n, 1)).to(device, dtype)
    aabb = torch.tensor(box, dtype=dtype, device=device)
    return origins, directions, *ray_box(origins, directions, outer_box(aabb, cascades), near=near, far=60.0), aabb


@pytest.mark.quick(32)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("resolution", [2, 6, 8, 32, 64])
@pytest.mark.parametrize("cascades", [2, 3, 5])
@pytest.mark.parametrize(("n", "box"), [(0, BOX), (1, OTHER_BOX), (113, BOX), (301, OTHER_BOX)])
def test_cascades_with_equal_steps(
    n: int, box: tuple[float, ...], cascades: int, resolution: int, dtype: torch.dtype, device: torch.device
) -> None:
    rays = scene(n, box, cascades, dtype, device)
    for share, step in [(0.5, 0.3), (0.02, 0.037), (0.001, 0.0511)]:
        bits = make_bits(resolution, share, device, cascades)
        arguments = (*rays, bits, resolution, step, True, 77)
        assert_same(march(*arguments, cascades=cascades), march_reference(*arguments, cascades=cascades))


@pytest.mark.quick(16)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("cascades", "resolution"), [(1, 1), (1, 13), (1, 64), (2, 4), (3, 32), (4, 64), (5, 8), (5, 18)]
)
@pytest.mark.parametrize(("n", "box"), [(0, BOX), (1, OTHER_BOX), (113, OTHER_BOX), (1023, BOX)])
def test_given_distances(
    n: int, box: tuple[float, ...], cascades: int, resolution: int, dtype: torch.dtype, device: torch.device
) -> None:
    rays = scene(n, box, cascades, dtype, device, near=0.3)
    random = 0.1 + torch.rand(200, dtype=torch.float64).mul(0.3).cumsum(0).to(dtype)
    for share, distances in [
        (0.5, cone_distances(0.1, 50.0, 0.05, 1.0, 0.02, dtype)),
        (0.02, cone_distances(0.05, 40.0, 0.02, math.inf, 0.01, dtype)),
        (0.001, cone_distances(0.2, 10.0, 0.03, 0.03, 0.0, dtype)),
        (0.1, random),
    ]:
        bits = make_bits(resolution, share, device, cascades)
        for jitter in (False, True):
            arguments = (*rays, bits, resolution, distances.to(device), jitter, 12345678901)
            found = march_lattice(*arguments, cascades=cascades)
            assert_same(found, march_lattice_reference(*arguments, cascades=cascades))


@pytest.mark.parametrize("resolution", [8, 32, 64])
def test_only_the_finest_cascade_that_holds_a_sample_counts(resolution: int, device: torch.device) -> None:
    """Full where finer cascades hide it, and full behind what is empty: rays through the hidden part find nothing."""
    grid = torch.zeros(4, resolution, resolution, resolution, device=device)
    inner = slice(resolution // 4, resolution - resolution // 4)
    grid[1:, inner, inner, inner] = 1.0
    rays = scene(257, BOX, 4, torch.float32, device)
    bits = occupancy_pack(grid, 0.5)
    assert len(march(*rays, bits, resolution, 0.037, True, 3, cascades=4)[1]) == 0
    grid[2, : resolution // 8] = 1.0  # the low-x eighth of [-4, 4]^3
    arguments = (*rays, occupancy_pack(grid, 0.5), resolution, 0.037, True, 3)
    found = march(*arguments, cascades=4)
    assert_same(found, march_reference(*arguments, cascades=4))
    origins, directions, *_ = rays
    positions = origins[found[2]] + found[1][:, None] * directions[found[2]]
    assert len(positions) > 100
    assert positions[:, 0].min() >= -4.0001
    assert positions[:, 0].max() <= -2.9999


@pytest.mark.parametrize("resolution", [8, 18])
@pytest.mark.parametrize("only", [0, 1, 3])
def test_all_that_is_occupied_lies_in_one_part(only: int, resolution: int, device: torch.device) -> None:
    """The rays that miss it need not be followed, and those that graze it must not be lost."""
    rays = scene(513, OTHER_BOX, 4, torch.float32, device)
    for low, high in [(0, 4), (resolution - 3, resolution), (0, resolution), (0, 0)]:
        grid = torch.zeros(4, resolution, resolution, resolution, device=device)
        grid[only, low:high, :, low:high] = 1.0
        arguments = (*rays, occupancy_pack(grid, 0.5), resolution, 0.043, True, 3)
        found = march(*arguments, cascades=4)
        assert_same(found, march_reference(*arguments, cascades=4))
        assert (len(found[1]) > 0) == (high > low)


@pytest.mark.parametrize("cascades", [2, 5])
def test_along_the_walls_of_cascades(cascades: int, device: torch.device) -> None:
    """Rays in the walls between cascades and within roundings of them, where which cascade it is hangs on a bit."""
    origins, directions = make_rays(1023, torch.float32, device)
    wall = 2.0 ** torch.randint(0, cascades, (1023,), device=device)
    axis = torch.randint(0, 3, (1023,), device=device)
    rows = torch.arange(1023, device=device)
    near_wall = wall * (1 + torch.randint(-2, 3, (1023,), device=device) * torch.finfo(torch.float32).eps / 2)
    origins[rows, axis] = near_wall * torch.where(rows % 2 == 0, 1.0, -1.0)
    directions[rows, axis] *= 1e-7 * (rows % 3)
    aabb = torch.tensor(BOX, device=device)
    near_far = ray_box(origins, directions, outer_box(aabb, cascades), far=20.0)
    rays = (origins, directions, *near_far, aabb)
    for resolution in (4, 32, 50):
        for share in (0.3, 0.005):
            arguments = (*rays, make_bits(resolution, share, device, cascades), resolution, 0.021, True, 3)
            assert_same(march(*arguments, cascades=cascades), march_reference(*arguments, cascades=cascades))


def test_far_from_the_origin(device: torch.device) -> None:
    """Where float32 has few digits left, suggestions for the next sample are wrong, and must be found out."""
    shift = 3000.0
    origins, directions = make_rays(113, torch.float32, device)
    aabb = torch.tensor(BOX, device=device) + shift
    t_near, t_far = ray_box(origins + shift, directions, outer_box(aabb, 3), near=0.1)
    rays = (origins + shift, directions, t_near, t_far, aabb, make_bits(64, 0.05, device, 3), 64)
    arguments = (*rays, cone_distances(0.1, 20.0, 0.003, 1.0, 0.01).to(device), True, 1)
    assert_same(march_lattice(*arguments, cascades=3), march_lattice_reference(*arguments, cascades=3))
    arguments = (*rays, 0.01, True, 1)
    assert_same(march(*arguments, cascades=3), march_reference(*arguments, cascades=3))


def test_one_ray_by_hand(device: torch.device) -> None:
    """Cascade 0 spans [-1, 1], cascade 1 [-2, 2]; R = 4. The ray runs along x from -2 to 2 at y = z = 0.1."""
    grid = torch.zeros(2, 4, 4, 4, device=device)
    grid[0, 3, 2, 2] = 1.0  # x in [0.5, 1)
    grid[1, 0, 2, 2] = 1.0  # x in [-2, -1)
    grid[1, 1, 2, 2] = 1.0  # x in [-1, 0): hidden by cascade 0
    distances = torch.tensor([1.0, 1.25, 1.75, 2.75, 3.5, 4.0, 6.0], device=device)
    rays = (
        torch.tensor([[-3.0, 0.1, 0.1]], device=device),
        torch.tensor([[1.0, 0.0, 0.0]], device=device),
        torch.tensor([1.0], device=device),
        torch.tensor([5.0], device=device),
        torch.tensor(BOX, device=device),
    )
    offsets, t, ray_indices, lengths = march_lattice(*rays, occupancy_pack(grid, 0.5), 4, distances, cascades=2)
    # Samples at t = 1.125, 1.5, 2.25, 3.125, 3.75, 5: x = -1.875, -1.5, -0.75, 0.125, 0.75, 2.
    assert offsets.tolist() == [0, 3]
    assert t.tolist() == [1.125, 1.5, 3.75]
    assert lengths.tolist() == [0.25, 0.5, 0.5]
    assert ray_indices.tolist() == [0, 0, 0]
    # From t_near on, which lies between the edges of a sample, and before t_far.
    rays[2][0], rays[3][0] = 1.2, 3.75
    assert march_lattice(*rays, occupancy_pack(grid, 0.5), 4, distances, cascades=2)[1].tolist() == [1.5]


def test_equal_distances_are_equal_steps(device: torch.device) -> None:
    origins, directions, _, t_far, aabb = scene(113, BOX, 2, torch.float64, device)
    bits = make_bits(16, 0.2, device, 2)
    rays = (origins, directions, torch.full_like(t_far, 0.5), t_far, aabb, bits, 16)
    offsets, t, ray_indices = march(*rays, 0.125, True, 5, cascades=2)
    found = march_lattice(*rays, 0.5 + 0.125 * torch.arange(800, device=device).double(), True, 5, cascades=2)
    assert_same((found[0], found[2]), (offsets, ray_indices))
    torch.testing.assert_close(found[1], t, rtol=1e-14, atol=0)
    assert (found[3] == 0.125).all()


def test_no_bitfield_is_the_outermost_box(device: torch.device) -> None:
    origins, directions, _, _, aabb = scene(257, OTHER_BOX, 3, torch.float32, device)
    t_near, t_far = torch.zeros(257, device=device), torch.full((257,), math.inf, device=device)
    rays = (origins, directions, t_near, t_far, aabb)
    full = torch.full((3 * 8**3 // 8,), 255, dtype=torch.uint8, device=device)
    distances = cone_distances(0.1, 50.0, 0.1, 1.0, 0.02).to(device)
    found = march_lattice(*rays, None, 8, distances, cascades=3)
    assert_same(found, march_lattice(*rays, full, 8, distances, cascades=3))
    assert_same(found, march_lattice_reference(*rays, None, 8, distances, cascades=3))
    positions = origins[found[2]] + found[1][:, None] * directions[found[2]]
    outer = outer_box(aabb, 3)
    assert ((positions >= outer[:3] - 1e-5) & (positions <= outer[3:] + 1e-5)).all()
    assert len(positions) > 1000


def test_rays_without_samples(device: torch.device) -> None:
    aabb = torch.tensor(BOX, device=device)
    inf, nan = math.inf, math.nan
    starts = torch.tensor([inf, nan, -inf, 0.0, 0.0, 0.0, 0.0, 0.0], device=device)
    ends = torch.tensor([inf, 1.0, 1.0, nan, -1.0, inf, inf, 0.05], device=device)
    origins = torch.zeros(8, 3, device=device)
    directions = torch.tensor([[0.0, 0.0, 1.0]], device=device).repeat(8, 1)
    directions[5] = 0.0
    directions[6] = nan
    arguments = (origins, directions, starts, ends, aabb, None, 8, cone_distances(0.1, 9.0, 0.1, 1.0, 0.1).to(device))
    offsets, *rest = march_lattice(*arguments, cascades=2)
    assert offsets.tolist() == [0] * 9
    assert [len(tensor) for tensor in rest] == [0, 0, 0]
    assert_same((offsets, *rest), march_lattice_reference(*arguments, cascades=2))
    only_an_edge = (*arguments[:2], torch.zeros_like(starts), torch.full_like(ends, inf), *arguments[4:7], starts[3:4])
    assert march_lattice(*only_an_edge)[0].tolist() == [0] * 9


def test_capacity(device: torch.device) -> None:
    rays = scene(113, BOX, 3, torch.float32, device)
    distances = cone_distances(0.1, 20.0, 0.03, 1.0, 0.02).to(device)
    arguments = (*rays, make_bits(8, 0.5, device, 3), 8, distances)
    offsets, *samples = march_lattice(*arguments, cascades=3)
    n = len(samples[0])
    for capacity in (0, 1, n // 2, n, n + 100):
        roomy_offsets, *roomy = march_lattice(*arguments, capacity=capacity, cascades=3)
        kept = min(n, capacity)
        assert torch.equal(roomy_offsets, offsets)
        for one, other, rest in zip(roomy, samples, (0, 112, 0), strict=True):
            assert len(one) == capacity
            assert torch.equal(one[:kept], other[:kept])
            assert (one[kept:] == rest).all()


def test_non_contiguous_input(device: torch.device) -> None:
    tensors = (*scene(113, BOX, 2, torch.float32, device), make_bits(6, 0.3, device, 2))
    distances = cone_distances(0.1, 20.0, 0.03, 1.0, 0.02).to(device)
    expected = march_lattice(*tensors, 6, distances, True, 4, cascades=2)
    wide = [torch.stack([tensor, tensor], dim=-1)[..., 0] for tensor in (*tensors, distances)]
    assert not any(tensor.is_contiguous() for tensor in wide)
    assert_same(march_lattice(*wide[:-1], 6, wide[-1], True, 4, cascades=2), expected)


def test_opcheck(device: torch.device) -> None:
    rays = scene(13, BOX, 2, torch.float32, device)
    distances = cone_distances(0.1, 20.0, 0.1, 1.0, 0.02).to(device)
    bits = make_bits(4, 0.5, device, 2)
    torch.library.opcheck(_march_lattice, (*rays, bits, 4, distances, True, 1, None, 2))
    torch.library.opcheck(_march_lattice, (*rays, None, 4, distances, False, 0, 100, 2))


def test_cone_distances() -> None:
    distances = cone_distances(0.5, 20.0, 0.01, 0.25, 1 / 64, torch.float64)
    lengths = distances.diff()
    assert distances[0] == 0.5
    assert distances[-2] < 20.0 <= distances[-1]
    torch.testing.assert_close(lengths, (distances[:-1] / 64).clamp(0.01, 0.25), rtol=1e-12, atol=1e-14)
    assert lengths.min() == pytest.approx(0.01, rel=1e-12)
    assert lengths.max() == pytest.approx(0.25, rel=1e-12)
    # float32 is the same table, rounded once; another far end, the same beginning.
    assert torch.equal(cone_distances(0.5, 20.0, 0.01, 0.25, 1 / 64), distances.float())
    longer = cone_distances(0.5, 30.0, 0.01, 0.25, 1 / 64, torch.float64)
    assert torch.equal(longer[: len(distances)], distances)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"near": 2.0}, "near and far must be numbers, near < far, got 2.0 and 1.0"),
        ({"far": math.inf}, "near and far must be numbers"),
        ({"near": math.nan}, "near and far must be numbers"),
        ({"min_step": 0.0}, "want 0 < min_step <= max_step, got 0.0 and 0.5"),
        ({"max_step": 0.05}, "want 0 < min_step <= max_step"),
        ({"cone_angle": -0.1}, "cone_angle must be at least 0, got -0.1"),
        ({"near": 0.9999, "min_step": 1e-8}, r"min_step 1e-08 is below what torch.float32 can tell apart at 1.0"),
    ],
)
def test_bad_cone(change: dict[str, float], message: str) -> None:
    arguments = {"near": 0.1, "far": 1.0, "min_step": 0.1, "max_step": 0.5, "cone_angle": 0.0}
    with pytest.raises(ValueError, match=message):
        cone_distances(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cascades": 0}, ValueError, "cascades must be between 1 and 16"),
        ({"cascades": 17}, ValueError, "cascades must be between 1 and 16"),
        ({"cascades": 2, "resolution": 1100}, ValueError, r"less than 2\^31 cells together, got 2 of resolution 1100"),
        ({"resolution": 3}, ValueError, "resolution must be even with several cascades, got 3"),
        ({"cascades": 3}, ValueError, r"bitfield must have shape \[192\], got \[128\]"),
        ({"distances": torch.zeros(2, 2)}, ValueError, r"distances must have shape \[n \+ 1\], got \[2, 2\]"),
        ({"distances": torch.zeros(0)}, ValueError, "distances must be 1 to"),
        ({"distances": torch.arange(4).double()}, TypeError, "distances must be torch.float32, got torch.float64"),
        ({"distances": torch.tensor([0.0, 1.0, 1.0])}, ValueError, "distances must be finite and rise"),
        ({"distances": torch.tensor([0.0, 1.0, math.inf])}, ValueError, "distances must be finite and rise"),
        ({"distances": torch.tensor([0.0, math.nan, 2.0])}, ValueError, "distances must be finite and rise"),
        ({"capacity": -1}, ValueError, "capacity must be between 0"),
        ({"seed": -1}, ValueError, "seed must be in"),
    ],
)
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "origins": torch.zeros(4, 3),
        "directions": torch.ones(4, 3),
        "t_near": torch.zeros(4),
        "t_far": torch.ones(4),
        "aabb": torch.tensor(BOX),
        "bitfield": torch.zeros(128, dtype=torch.uint8),
        "resolution": 8,
        "distances": torch.arange(4.0),
        "cascades": 2,
    }
    with pytest.raises(error, match=message):
        march_lattice(**{**arguments, **change})


@pytest.mark.gpu
def test_waits_for_the_gpu_never_with_a_capacity() -> None:
    device = torch.device("cuda")
    rays = scene(113, BOX, 3, torch.float32, device)
    distances = cone_distances(0.1, 20.0, 0.03, 1.0, 0.02).to(device)
    arguments = (*rays, make_bits(8, 0.5, device, 3), 8, distances, True, 1)
    expected = march_lattice(*arguments, cascades=3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = march_lattice(*arguments, capacity=100_000, cascades=3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(tuple(x[: len(e)] for x, e in zip(found, expected, strict=True)), expected)


@pytest.mark.gpu
def test_gpu_gives_what_the_cpu_gives() -> None:
    arguments = (*scene(1023, BOX, 4, torch.float32, torch.device("cpu")), make_bits(64, 0.1, torch.device("cpu"), 4))
    distances = cone_distances(0.1, 40.0, 0.02, 1.0, 0.01)
    on_gpu = march_lattice(
        *(tensor.cuda() for tensor in arguments), 64, distances.cuda(), jitter=True, seed=9, cascades=4
    )
    on_cpu = march_lattice(*arguments, 64, distances, jitter=True, seed=9, cascades=4)
    assert_same(tuple(tensor.cpu() for tensor in on_gpu), on_cpu)
