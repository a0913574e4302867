from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from marching import BOX, OTHER_BOX, assert_same, make_bits, make_rays

import dreamfusion_fast
from dreamfusion_fast.ops import march, march_reference, occupancy_pack, ray_box
from dreamfusion_fast.ops.march import _march, uniform_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("resolution", [1, 3, 8, 13, 64])
@pytest.mark.parametrize(("n", "box"), [(0, BOX), (1, OTHER_BOX), (113, BOX), (1023, OTHER_BOX)])
def test_equals_visiting_every_step(
    n: int, box: tuple[float, ...], resolution: int, dtype: torch.dtype, device: torch.device
) -> None:
    origins, directions = make_rays(n, dtype, device)
    aabb = torch.tensor(box, dtype=dtype, device=device)
    for share, step, near in [(0.5, 0.1, 0.0), (0.02, 0.013, -2.0), (0.002, 0.0311, 0.2)]:
        t_near, t_far = ray_box(origins, directions, aabb, near=near, far=4.0)
        bits = make_bits(resolution, share, device)
        for jitter in (False, True):
            arguments = (origins, directions, t_near, t_far, aabb, bits, resolution, step, jitter, 12345678901)
            assert_same(march(*arguments), march_reference(*arguments))


@pytest.mark.parametrize("resolution", [13, 32])
def test_rays_that_were_not_cut_to_the_box(resolution: int, device: torch.device) -> None:
    """From far outside, and with no end: the box alone decides."""
    origins, directions = make_rays(257, torch.float32, device, spread=4.0)
    aabb = torch.tensor(BOX, device=device)
    t_near = torch.zeros(257, device=device)
    t_far = torch.full((257,), math.inf, device=device)
    for bits in (None, make_bits(resolution, 0.1, device)):
        arguments = (origins, directions, t_near, t_far, aabb, bits, resolution, 0.0137, True, 5)
        found = march(*arguments)
        assert_same(found, march_reference(*arguments))
        assert found[0][-1] > 0
        rays = found[2].long()
        positions = origins[rays] + found[1][:, None] * directions[rays]
        assert positions.abs().max() <= 1.0


@pytest.mark.parametrize("resolution", [13, 64])
@pytest.mark.parametrize("part", [(0, 3), (5, 8), (10, 13), (0, 13), (0, 0)])
def test_all_that_is_occupied_lies_in_one_part(resolution: int, part: tuple[int, int], device: torch.device) -> None:
    """The rays that miss it need not be followed, and those that graze it must not be lost."""
    low, high = (resolution * edge // 13 for edge in part)
    grid = torch.zeros(resolution, resolution, resolution, device=device)
    grid[low:high, : high - low, low:high] = 1.0
    bits = occupancy_pack(grid, 0.5)
    origins, directions = make_rays(1023, torch.float32, device)
    aabb = torch.tensor(OTHER_BOX, device=device)
    t_near, t_far = ray_box(origins, directions, aabb)
    for step in (0.011, 0.1, 0.7):
        arguments = (origins, directions, t_near, t_far, aabb, bits, resolution, step, True, 3)
        found = march(*arguments)
        assert_same(found, march_reference(*arguments))
        assert (len(found[1]) > 0) == (high > low)


def test_far_from_the_origin(device: torch.device) -> None:
    """Where float32 has few digits left, suggestions for the next sample are wrong, and must be found out."""
    shift = 3000.0
    origins, directions = make_rays(1023, torch.float32, device)
    aabb = torch.tensor(BOX, device=device) + shift
    t_near, t_far = ray_box(origins + shift, directions, aabb)
    arguments = (origins + shift, directions, t_near, t_far, aabb, make_bits(64, 0.05, device), 64, 0.003, True, 1)
    assert_same(march(*arguments), march_reference(*arguments))


def test_one_ray_by_hand(device: torch.device) -> None:
    grid = torch.zeros(4, 4, 4, device=device)
    grid[1, 2, 2] = 1.0  # x in [-0.5, 0)
    origins = torch.tensor([[-2.0, 0.1, 0.1]], device=device)
    directions = torch.tensor([[1.0, 0.0, 0.0]], device=device)
    aabb = torch.tensor(BOX, device=device)
    t_near, t_far = ray_box(origins, directions, aabb)
    offsets, t, ray_indices = march(origins, directions, t_near, t_far, aabb, occupancy_pack(grid, 0.5), 4, 0.25)
    assert offsets.tolist() == [0, 2]
    assert t.tolist() == [1.625, 1.875]
    assert ray_indices.tolist() == [0, 0]


def test_packing(device: torch.device) -> None:
    origins, directions = make_rays(113, torch.float32, device)
    aabb = torch.tensor(BOX, device=device)
    t_near, t_far = ray_box(origins, directions, aabb)
    offsets, t, ray_indices = march(
        origins, directions, t_near, t_far, aabb, make_bits(13, 0.3, device), 13, 0.03, True
    )
    assert (offsets.dtype, t.dtype, ray_indices.dtype) == (torch.int32, torch.float32, torch.int32)
    assert offsets[0] == 0
    assert offsets[-1] == len(t) == len(ray_indices)
    assert torch.equal(torch.repeat_interleave(torch.arange(113, device=device), offsets.diff()).int(), ray_indices)
    same_ray = ray_indices[1:] == ray_indices[:-1]
    assert (t[1:] > t[:-1])[same_ray].all()
    assert ((t >= t_near[ray_indices]) & (t < t_far[ray_indices])).all()


def test_rays_without_samples(device: torch.device) -> None:
    aabb = torch.tensor(BOX, device=device)
    inf, nan = math.inf, math.nan
    starts = torch.tensor([inf, nan, -inf, 0.0, 0.0, 0.0, 0.0], device=device)
    ends = torch.tensor([inf, 1.0, 1.0, nan, -1.0, inf, inf], device=device)
    origins = torch.zeros(7, 3, device=device)
    directions = torch.tensor([[0.0, 0.0, 1.0]], device=device).repeat(7, 1)
    directions[5] = 0.0
    directions[6] = nan
    arguments = (origins, directions, starts, ends, aabb, None, 8, 0.1)
    offsets, t, _ = march(*arguments)
    assert offsets.tolist() == [0] * 8
    assert len(t) == 0
    assert_same(march(*arguments), march_reference(*arguments))


def test_no_bitfield_is_all_occupied(device: torch.device) -> None:
    origins, directions = make_rays(113, torch.float32, device)
    aabb = torch.tensor(OTHER_BOX, device=device)
    t_near, t_far = ray_box(origins, directions, aabb)
    full = torch.full(((13**3 + 7) // 8,), 255, dtype=torch.uint8, device=device)
    assert_same(
        march(origins, directions, t_near, t_far, aabb, None, 13, 0.03),
        march(origins, directions, t_near, t_far, aabb, full, 13, 0.03),
    )


def test_empty_grid(device: torch.device) -> None:
    origins, directions = make_rays(113, torch.float32, device)
    aabb = torch.tensor(BOX, device=device)
    empty = torch.zeros(64, dtype=torch.uint8, device=device)
    offsets, t, _ = march(origins, directions, *ray_box(origins, directions, aabb), aabb, empty, 8, 0.03)
    assert len(t) == 0
    assert not offsets.any()


def test_capacity(device: torch.device) -> None:
    origins, directions = make_rays(113, torch.float32, device)
    aabb = torch.tensor(BOX, device=device)
    arguments = (origins, directions, *ray_box(origins, directions, aabb), aabb, make_bits(8, 0.5, device), 8, 0.03)
    offsets, t, ray_indices = march(*arguments)
    n = len(t)
    for capacity in (0, 1, n // 2, n, n + 100):
        roomy_offsets, roomy_t, roomy_rays = march(*arguments, capacity=capacity)
        kept = min(n, capacity)
        assert torch.equal(roomy_offsets, offsets)  # the true counts, whatever the room
        assert len(roomy_t) == len(roomy_rays) == capacity
        assert torch.equal(roomy_t[:kept], t[:kept])
        assert torch.equal(roomy_rays[:kept], ray_indices[:kept])
        assert not roomy_t[kept:].any()
        assert (roomy_rays[kept:] == 112).all()


def test_non_contiguous_input(device: torch.device) -> None:
    origins, directions = make_rays(113, torch.float32, device)
    aabb = torch.tensor(BOX, device=device)
    t_near, t_far = ray_box(origins, directions, aabb)
    bits = make_bits(13, 0.3, device)
    expected = march(origins, directions, t_near, t_far, aabb, bits, 13, 0.05)
    wide = [
        torch.stack([tensor, tensor], dim=-1)[..., 0] for tensor in (origins, directions, t_near, t_far, aabb, bits)
    ]
    assert not any(tensor.is_contiguous() for tensor in wide)
    assert_same(march(*wide, 13, 0.05), expected)


def test_threads_do_not_matter() -> None:
    origins, directions = make_rays(1023, torch.float32, torch.device("cpu"))
    aabb = torch.tensor(BOX)
    arguments = (origins, directions, *ray_box(origins, directions, aabb), aabb, None, 8, 0.05, True, 3)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(march(*arguments))
    finally:
        torch.set_num_threads(threads)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_after_a_fork() -> None:
    """A forked process, such as a data loader's, has none of the threads that its parent has started."""
    program = """
import os, torch
from dreamfusion_fast.ops import ray_box
torch.set_num_threads(3)
rays = torch.zeros(10_000, 3), torch.ones(10_000, 3), torch.tensor([-1.0, -1, -1, 1, 1, 1])
assert ray_box(*rays)[1].eq(1).all()
child = os.fork()
if child == 0:
    os._exit(0 if ray_box(*rays)[1].eq(1).all() else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    # From where the package under test lies: a source tree as working folder would hide an installed one.
    folder = Path(dreamfusion_fast.__file__).parents[1]
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=folder)


def test_uniform_numbers() -> None:
    indices = torch.arange(100_000)
    numbers = uniform_reference(7, indices, torch.float64)
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    # Mean, variance, and neighbours' correlation of a uniform distribution, to 5 sigma.
    assert abs(numbers.mean() - 0.5) < 5 / math.sqrt(12 * 100_000)
    assert abs(numbers.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / 100_000)
    other = uniform_reference(8, indices, torch.float64)
    for pair in ((numbers[1:], numbers[:-1]), (numbers, other)):
        assert abs(torch.corrcoef(torch.stack(pair))[0, 1]) < 5 / math.sqrt(100_000)
    assert torch.equal(uniform_reference(7, indices, torch.float32).double(), numbers)
    # Both halves of the seed count.
    assert not torch.equal(uniform_reference(7 + (1 << 40), indices, torch.float64), numbers)


def test_opcheck(device: torch.device) -> None:
    origins, directions = make_rays(13, torch.float32, device)
    aabb = torch.tensor(BOX, device=device)
    rays = (origins, directions, *ray_box(origins, directions, aabb), aabb)
    torch.library.opcheck(_march, (*rays, make_bits(3, 0.5, device), 3, 0.1, True, 1, None))
    torch.library.opcheck(_march, (*rays, None, 3, 0.1, False, 0, 100))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"origins": torch.zeros(3, 4)}, ValueError, r"origins must have shape \[n_rays, 3\], got \[3, 4\]"),
        ({"directions": torch.zeros(3, 3)}, ValueError, "directions has 3 rows, origins has 4"),
        ({"t_near": torch.zeros(4, 1)}, ValueError, r"t_near must have shape \[n_rays\], got \[4, 1\]"),
        ({"t_far": torch.zeros(4).double()}, TypeError, "t_far must be torch.float32, got torch.float64"),
        ({"t_far": torch.zeros(4, device="meta")}, ValueError, "t_far is on meta, the other arguments are on cpu"),
        ({"aabb": torch.zeros(2, 3)}, ValueError, r"aabb must have shape \[6\]"),
        ({"bitfield": torch.zeros(8, dtype=torch.uint8)}, ValueError, r"bitfield must have shape \[64\], got \[8\]"),
        ({"bitfield": torch.zeros(64)}, TypeError, "bitfield must be torch.uint8, got torch.float32"),
        ({"resolution": 0}, ValueError, "resolution must be between 1 and 1290, got 0"),
        ({"step": 0.0}, ValueError, "step must be a positive number, got 0.0"),
        ({"step": math.inf}, ValueError, "step must be a positive number, got inf"),
        ({"seed": -1}, ValueError, "seed must be in"),
        ({"capacity": -1}, ValueError, "capacity must be between 0"),
    ],
)
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "origins": torch.zeros(4, 3),
        "directions": torch.ones(4, 3),
        "t_near": torch.zeros(4),
        "t_far": torch.ones(4),
        "aabb": torch.tensor(BOX),
        "bitfield": torch.zeros(64, dtype=torch.uint8),
        "resolution": 8,
        "step": 0.1,
    }
    with pytest.raises(error, match=message):
        march(**{**arguments, **change})


@pytest.mark.gpu
def test_waits_for_the_gpu_once_or_with_a_capacity_never() -> None:
    device = torch.device("cuda")
    origins, directions = make_rays(113, torch.float32, device)
    aabb = torch.tensor(BOX, device=device)
    arguments = (origins, directions, *ray_box(origins, directions, aabb), aabb, make_bits(8, 0.5, device), 8, 0.03)
    march(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        march(*arguments, capacity=1000)
        ray_box(origins, directions, aabb)
        with pytest.raises(RuntimeError, match="synchronizing"):
            march(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_rays_without_an_end_stop_behind_the_box() -> None:
    """Few rays are counted without skipping: each to 2^24 steps took 160 ms, where it goes on for ever."""
    origins, directions = make_rays(113, torch.float32, "cuda")
    near = torch.zeros(113, device="cuda")
    far = torch.full((113,), 1e10, device="cuda")
    box = torch.tensor(BOX, device="cuda")
    march(origins, directions, near, far, box, None, 1, 0.01)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    offsets, t, _ = march(origins, directions, near, far, box, None, 1, 0.01)
    end.record()
    end.synchronize()
    assert begin.elapsed_time(end) < 20.0
    expected = march_reference(origins.cpu(), directions.cpu(), near.cpu(), far.cpu(), box.cpu(), None, 1, 0.01)
    assert torch.equal(offsets.cpu(), expected[0])
    assert torch.equal(t.cpu(), expected[1])


@pytest.mark.gpu
def test_gpu_gives_what_the_cpu_gives() -> None:
    origins, directions = make_rays(1023, torch.float32, torch.device("cpu"))
    aabb, bits = torch.tensor(BOX), make_bits(64, 0.1, torch.device("cpu"))
    arguments = (origins, directions, *ray_box(origins, directions, aabb), aabb, bits)
    on_gpu = march(*(tensor.cuda() for tensor in arguments), 64, 0.01, True, 9)
    assert_same(tuple(tensor.cpu() for tensor in on_gpu), march(*arguments, 64, 0.01, True, 9))
