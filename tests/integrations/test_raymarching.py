"""raymarching's functions against their rules, written out here per ray in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from morton_rules import interleaved, written_out
from raymarching_cases import scene
from torch import Tensor

from dreamfusion_fast.integrations import raymarching
from dreamfusion_fast.integrations.raymarching import torch_ngp
from dreamfusion_fast.ops import occupancy_pack
from dreamfusion_fast.ops.march import march
from dreamfusion_fast.rendering import OccupancyGrid

CASES = [(1.0, 16, 1, 0.0, 1024), (2.0, 8, 2, 0.02, 512), (3.0, 16, 3, 1 / 64, 256), (1.5, 8, 2, 0.1, 128)]


@pytest.mark.parametrize("contract", [False, True])
@pytest.mark.parametrize(("bound", "size", "cascades", "dt_gamma", "max_steps"), CASES)
def test_march_rays_train_follows_the_rules(
    bound: float, size: int, cascades: int, dt_gamma: float, max_steps: int, contract: bool, device: torch.device
) -> None:
    """Steps begin on the box's face, store their end, look up cascades with boxes min(2^c, bound), by step, too."""
    origins, directions, grid, bits = scene(113, bound, size, cascades, device)
    box = torch.tensor([-bound] * 3 + [bound] * 3, device=device)
    nears, fars = raymarching.near_far_from_aabb(origins, directions, box, 0.05)
    arguments = (origins, directions, bound, bits, cascades, size, nears, fars, False, dt_gamma, max_steps, contract)
    xyzs, dirs, ts, rays = raymarching.march_rays_train(*arguments)
    assert [x.dtype for x in (xyzs, dirs, ts, rays)] == [torch.float32] * 3 + [torch.int32]
    occupied = (grid > 0.7).tolist()
    agreeing, total = 0, 0
    for ray in range(113):
        first, count = rays[ray].tolist()
        wanted = written_out(
            origins[ray].tolist(),
            directions[ray].tolist(),
            float(nears[ray]),
            float(fars[ray]),
            occupied,
            bound,
            size,
            dt_gamma,
            max_steps,
            max_steps,
            bound,
            contract=contract,
        )
        total += len(wanted)
        mine = ts[first : first + count].double().cpu()
        assert torch.equal(dirs[first : first + count], directions[ray].expand(count, 3))
        if count != len(wanted) or count == 0:
            agreeing += count == len(wanted)
            continue
        expected = torch.tensor([sample[1:] for sample in wanted], dtype=torch.float64)
        positions = torch.tensor([sample[0] for sample in wanted], dtype=torch.float64)
        close = torch.allclose(mine, expected, rtol=0, atol=2e-4) and torch.allclose(
            xyzs[first : first + count].double().cpu(), positions, rtol=0, atol=2e-4
        )
        agreeing += close
    # A float32 that rounds across a wall moves what comes behind it: of few rays. Of float64 all agree, see
    # tests/ops/test_march_morton.py.
    assert total > 300
    assert agreeing >= 100
    assert torch.equal(rays[1:, 0], (rays[:, 0] + rays[:, 1])[:-1])
    assert rays[-1].sum() == len(ts)


def test_the_first_sample_lies_on_the_face_of_the_box(device: torch.device) -> None:
    origins = torch.tensor([[-3.0, 0.1, 0.1]], device=device)
    directions = torch.tensor([[1.0, 0.0, 0.0]], device=device)
    bits = torch.full((8,), 255, dtype=torch.uint8, device=device)
    near, far = torch.tensor([2.0], device=device), torch.tensor([4.0], device=device)
    xyzs, _, ts, rays = raymarching.march_rays_train(origins, directions, 1, bits, 1, 4, near, far, False, 0, 64)
    dt = 2 * math.sqrt(3) / 64
    assert rays.tolist() == [[0, 37]]
    torch.testing.assert_close(xyzs[0], torch.tensor([-1.0, 0.1, 0.1], device=device))
    torch.testing.assert_close(ts[:2].cpu(), torch.tensor([[2 + dt, dt], [2 + 2 * dt, dt]]))
    few = raymarching.march_rays_train(origins, directions, 1, bits, 1, 4, near, far, False, 0, 16)
    assert few[3].tolist() == [[0, 10]]
    limited = raymarching.march_rays_train(origins, directions, 1, bits, 1, 4, near, far + 9, False, 0, 16)
    assert limited[3].tolist() == [[0, 16]]


def test_perturbed_rays_begin_within_a_step(device: torch.device) -> None:
    origins, directions, _, bits = scene(1023, 1.0, 8, 1, device, share=1.0)
    nears, fars = raymarching.near_far_from_aabb(
        origins, directions, torch.tensor([-1.0] * 3 + [1.0] * 3, device=device)
    )
    torch.manual_seed(3)
    _, _, ts, rays = raymarching.march_rays_train(origins, directions, 1, bits, 1, 8, nears, fars, True, 0, 128)
    torch.manual_seed(3)
    again = raymarching.march_rays_train(origins, directions, 1, bits, 1, 8, nears, fars, True, 0, 128)
    assert torch.equal(ts, again[2])
    hit = rays[:, 1] > 0
    first = ts[rays[hit, 0].long()]
    offset = (first[:, 0] - first[:, 1] - nears[hit]) / first[:, 1]
    assert -1e-3 < offset.min() < 0.02
    assert 0.98 < offset.max() < 1 + 1e-3
    assert abs(offset.mean() - 0.5) < 0.05


def test_near_and_far(device: torch.device) -> None:
    origins = torch.tensor([[-3.0, 0, 0], [-3, 5, 0], [0, 0, 0], [3, 0, 0]], device=device)
    directions = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 2], [1, 0, 0]], device=device)
    box = torch.tensor([-1.0, -1, -1, 1, 1, 1], device=device)
    nears, fars = raymarching.near_far_from_aabb(origins.view(2, 2, 3), directions.view(2, 2, 3), box, 0.2)
    most = torch.finfo(torch.float32).max
    assert nears.tolist() == pytest.approx([2.0, most, 0.2, 0.2])
    assert fars.tolist() == pytest.approx([4.0, most, 0.5, -2.0])


def test_directions_on_the_sphere(device: torch.device) -> None:
    origins = 0.5 * torch.randn(113, 3, dtype=torch.float64).clamp(-1, 1).to(device)
    directions = torch.randn(113, 3, dtype=torch.float64, device=device)
    coords = raymarching.sph_from_ray(origins, directions, 2.0)
    theta, phi = (coords[:, 0].double() + 1) * math.pi / 2, coords[:, 1].double() * math.pi
    points = 2 * torch.stack([theta.sin() * phi.cos(), theta.cos(), theta.sin() * phi.sin()], dim=1)
    along = torch.linalg.cross(points - origins, directions).norm(dim=1) / directions.norm(dim=1)
    assert along.max() < 1e-5  # on the ray, and ahead
    assert (((points - origins) * directions).sum(dim=1) > 0).all()


def test_morton_order_and_bits(device: torch.device) -> None:
    cells = torch.randint(0, 128, (1023, 3), dtype=torch.int32, device=device)
    indices = raymarching.morton3D(cells)
    assert indices.dtype == torch.int32
    assert indices.tolist() == [interleaved(cell) for cell in cells.tolist()]
    assert torch.equal(raymarching.morton3D_invert(indices), cells)
    grid = torch.rand(2, 64, device=device)
    bits = raymarching.packbits(grid, 0.5)
    wanted = [sum((grid.view(-1)[8 * byte + bit].item() > 0.5) << bit for bit in range(8)) for byte in range(16)]
    assert bits.tolist() == wanted
    given = torch.zeros(16, dtype=torch.uint8, device=device)
    assert raymarching.packbits(grid, torch.tensor(0.5, device=device), given) is given
    assert given.tolist() == wanted


def test_a_linear_bitfield_becomes_one_in_morton_order(device: torch.device) -> None:
    grid = torch.rand(2, 8, 8, 8, device=device) > 0.7
    bits = raymarching.morton_bitfield(occupancy_pack(grid.float(), 0.5), 8, 2)
    for _ in range(113):
        level, x, y, z = torch.randint(0, 2, (1,)).item(), *torch.randint(0, 8, (3,)).tolist()
        place = 512 * level + interleaved([x, y, z])
        assert (bits[place // 8].item() >> place % 8) & 1 == grid[level, x, y, z].item()
    origins, directions, *_ = scene(9, 1.0, 8, 2, device)
    near, far = torch.zeros(9, device=device), torch.ones(9, device=device)
    raymarching.march_rays_train(origins, directions, 2, bits, 2, 8, near, far)  # is not refused
    with pytest.raises(ValueError, match="morton_bitfield: resolution must be a power of two from 2 to 1024, got 6"):
        raymarching.morton_bitfield(bits, 6)


def test_flattened_rays(device: torch.device) -> None:
    rays = torch.tensor([[4, 2], [0, 3], [9, 0], [3, 1], [7, 9]], dtype=torch.int32, device=device)
    found = raymarching.flatten_rays(rays, 8)  # of samples 6 and 7 is none, and the last ray has too many
    assert found.dtype == torch.int32
    assert found.tolist() == [1, 1, 1, 3, 0, 0, 0, 0]


def composite_written_out(
    sigmas: Tensor, rgbs: Tensor, t: Tensor, dt: Tensor, rays: list[list[int]], threshold: float
) -> tuple[Tensor, ...]:
    """In autograd's doubles, sample by sample."""
    weights = torch.zeros(len(sigmas), dtype=torch.float64)
    sums, depths, images = [], [], []
    for first, count in rays:
        reaching, opacity, depth, image = 1.0, 0.0, 0.0, torch.zeros(3, dtype=torch.float64)
        for i in range(first, first + count):
            alpha = 1 - torch.exp(-sigmas[i] * dt[i])
            weight = alpha * reaching
            weights = weights + weight * (torch.arange(len(sigmas)) == i)
            opacity, depth, image = opacity + weight, depth + weight * t[i], image + weight * rgbs[i]
            reaching = reaching * (1 - alpha)
            if reaching < threshold:
                break
        sums.append(opacity)
        depths.append(depth)
        images.append(image)
    as_tensor = [
        torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in part]) for part in (sums, depths, images)
    ]
    return weights, *as_tensor


RAYS = {
    "as marched": [[0, 5], [5, 0], [5, 31], [36, 4]],
    "in another order": [[9, 4], [0, 5], [7, 0], [13, 20], [35, 5]],
}


@pytest.mark.parametrize("threshold", [0.0, 1e-4, 0.2])
@pytest.mark.parametrize("kind", RAYS)
def test_compositing_and_its_gradients(kind: str, threshold: float, device: torch.device) -> None:
    """Through each of the four results, per-sample weights included."""
    torch.manual_seed(1)
    sigmas, rgbs = 20 * torch.rand(40, dtype=torch.float64) ** 2, torch.rand(40, 3, dtype=torch.float64)
    ts = torch.stack([torch.rand(40).cumsum(0), 0.05 + 0.1 * torch.rand(40)], dim=1)
    inputs = [x.float().to(device).requires_grad_() for x in (sigmas, rgbs)]
    wide = [x.requires_grad_() for x in (sigmas, rgbs)]
    rays = torch.tensor(RAYS[kind], dtype=torch.int32, device=device)
    found = raymarching.composite_rays_train(*inputs, ts.to(device), rays, threshold)
    wanted = composite_written_out(*wide, *ts.double().unbind(1), RAYS[kind], threshold)
    for a, e in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double().cpu(), e, rtol=1e-5, atol=1e-5)
    for a, e in zip(found, wanted, strict=True):
        grad = torch.randn_like(e)
        expected = torch.autograd.grad(e, wide, grad, retain_graph=True, allow_unused=True, materialize_grads=True)
        actual = torch.autograd.grad(a, inputs, grad.float().to(device), retain_graph=True)
        for mine, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(mine.double().cpu(), theirs, rtol=1e-4, atol=1e-4)


def test_marched_rays_composite_as_any(device: torch.device) -> None:
    """What is marked as in order is not looked at again, and gives the same."""
    origins, directions, _, bits = scene(113, 1.0, 16, 1, device)
    nears, fars = raymarching.near_far_from_aabb(
        origins, directions, torch.tensor([-1.0] * 3 + [1.0] * 3, device=device)
    )
    *_, ts, rays = raymarching.march_rays_train(origins, directions, 1, bits, 1, 16, nears, fars)
    sigmas, rgbs = 9 * torch.rand(len(ts), device=device), torch.rand(len(ts), 3, device=device)
    marked = raymarching.composite_rays_train(sigmas, rgbs, ts, rays)
    for a, e in zip(raymarching.composite_rays_train(sigmas, rgbs, ts, rays.clone()), marked, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-6)


def test_binarized_weights(device: torch.device) -> None:
    sigmas = torch.tensor([1.0, 3.0, 9.0, 9.0], device=device, requires_grad=True)
    ts = torch.tensor([[1.0, 0.2], [1.2, 0.2], [1.4, 0.2], [1.6, 0.2]], device=device)
    rays, rgbs = torch.tensor([[0, 4]], dtype=torch.int32, device=device), torch.eye(4, 3, device=device)
    weights, weights_sum, depth, image = raymarching.composite_rays_train(sigmas, rgbs, ts, rays, 1e-4, True)
    assert weights.tolist() == [0, 0, 1, 0]  # alphas are 0.18, 0.45, 0.83, 0.83
    assert (weights_sum.item(), depth.item(), image.tolist()) == (1, pytest.approx(1.4), [[0, 0, 1]])
    (gradient,) = torch.autograd.grad(image[0, 2], sigmas)
    # Those that let all light through would take it from the opaque one.
    torch.testing.assert_close(gradient, torch.tensor([-0.2, -0.2, 0.0, 0.0], device=device))


@pytest.mark.parametrize("flavour", [raymarching, torch_ngp], ids=["stable-dreamfusion", "torch-ngp"])
@pytest.mark.parametrize("dt_gamma", [0.0, 0.02])
def test_a_picture_in_parts_is_the_picture(flavour: object, dt_gamma: float, device: torch.device) -> None:
    """As a renderer runs it: march some steps, composite them, drop the rays that ended."""
    n = 113
    origins, directions, _, bits = scene(n, 2.0, 16, 2, device)
    box = torch.tensor([-2.0] * 3 + [2.0] * 3, device=device)
    nears, fars = raymarching.near_far_from_aabb(origins, directions, box)

    def density(x: Tensor) -> tuple[Tensor, Tensor]:
        return 3 * (x[:, 0].sin() + 1), (x.sin() + 1) / 2

    grid = (2.0, bits, 2, 16, nears, fars)
    xyzs, _, spans, rays = raymarching.march_rays_train(origins, directions, *grid, False, dt_gamma, 256)
    _, wanted_sum, wanted_depth, wanted_image = raymarching.composite_rays_train(*density(xyzs), spans, rays, 0.0)
    weights_sum, depth, image = (torch.zeros(n, *shape, device=device) for shape in ((), (), (3,)))
    alive, t = torch.arange(n, dtype=torch.int32, device=device), nears.clone()
    options = (False, dt_gamma, 256) if flavour is raymarching else (-1, False, dt_gamma, 256)
    for _ in range(300):
        if len(alive) == 0:
            break
        xyzs, dirs, deltas = flavour.march_rays(len(alive), 5, alive, t, origins, directions, *grid, *options)
        assert xyzs.shape == dirs.shape == (5 * len(alive), 3)
        state = (weights_sum, depth, image)
        flavour.composite_rays(len(alive), 5, alive, t, *density(xyzs), deltas, *state, 0.0)
        alive = alive[alive >= 0]
    assert len(alive) == 0
    assert wanted_sum.max() > 0.9
    torch.testing.assert_close(weights_sum, wanted_sum, rtol=0, atol=2e-4)
    torch.testing.assert_close(image, wanted_image, rtol=0, atol=2e-4)
    if flavour is raymarching:
        torch.testing.assert_close(depth, wanted_depth, rtol=0, atol=1e-3)


def test_compositing_in_place_by_hand(device: torch.device) -> None:
    """A ray ends with the first sample that too little light reaches, or where its samples do."""
    alive = torch.tensor([2, 0, 1], dtype=torch.int32, device=device)
    t = torch.tensor([0.5, 0.6, 0.7], device=device)
    weights_sum = torch.tensor([0.0, 0.5, 0.995], device=device)
    depth, image = torch.zeros(3, device=device), torch.zeros(3, 3, device=device)
    half = math.log(2.0)
    sigmas, rgbs = torch.full((6,), half, device=device), torch.ones(6, 3, device=device)
    ts = torch.tensor([[1.0, 1], [2, 1], [3, 1], [4, 1], [5, 1], [0, 0]], device=device)
    result = raymarching.composite_rays(3, 2, alive, t, sigmas, rgbs, ts, weights_sum, depth, image, 0.01)
    assert result == ()
    assert alive.tolist() == [-1, 0, -1]
    assert t.tolist() == pytest.approx([4.0, 0.6, 0.7])
    assert weights_sum.tolist() == pytest.approx([0.75, 0.75, 0.9975])
    assert depth.tolist() == pytest.approx([0.5 * 3 + 0.25 * 4, 0.25 * 5, 0.0025 * 1], abs=1e-6)
    assert image[:, 1].tolist() == pytest.approx([0.75, 0.25, 0.0025], abs=1e-6)


def test_linear_bitfields_are_not_taken_for_morton_ones(device: torch.device) -> None:
    origins, directions, grid, bits = scene(5, 1.0, 8, 1, device)
    near, far = torch.zeros(5, device=device), torch.ones(5, device=device)
    linear = [occupancy_pack(grid.view(8, 8, 8), 0.5), OccupancyGrid(resolution=8).to(device).bitfield]
    for bitfield in linear:
        with pytest.raises(ValueError, match="bitfield must have its cells in morton order, as raymarching's packbits"):
            raymarching.march_rays_train(origins, directions, 1, bitfield, 1, 8, near, far)
    box = torch.tensor([-1.0] * 3 + [1.0] * 3, device=device)
    with pytest.raises(ValueError, match="march: bitfield must have its cells in linear order, as occupancy_pack"):
        march(origins, directions, near, far, box, bits, 8, 0.1)
    unmarked = bits.clone()
    found = raymarching.march_rays_train(origins, directions, 1, unmarked, 1, 8, near, far)
    assert torch.equal(found[2], raymarching.march_rays_train(origins, directions, 1, bits, 1, 8, near, far)[2])


def test_torch_ngp_counts_and_pads(device: torch.device) -> None:
    origins, directions, _, bits = scene(113, 2.0, 8, 2, device)
    nears, fars = raymarching.near_far_from_aabb(
        origins, directions, torch.tensor([-2.0] * 3 + [2.0] * 3, device=device)
    )
    plain = raymarching.march_rays_train(origins, directions, 2.0, bits, 2, 8, nears, fars, False, 0.01, 128)
    total = len(plain[2])
    counter = torch.zeros(2, dtype=torch.int32, device=device)
    given = (origins, directions, 2.0, bits, 2, 8, nears, fars)
    xyzs, dirs, deltas, rays = torch_ngp.march_rays_train(*given, counter, -1, False, 128, False, 0.01, 128)
    assert counter.tolist() == [total, 113]
    assert len(xyzs) == len(dirs) == len(deltas) == total + 128 - total % 128
    assert torch.equal(xyzs[:total], plain[0])
    assert torch.equal(rays[:, 0], torch.arange(113, dtype=torch.int32, device=device))
    assert torch.equal(rays[:, 1:], plain[3])
    assert not xyzs[total:].any()
    ray = raymarching.flatten_rays(plain[3], total).long()
    reached = torch.zeros(113, dtype=torch.float64, device=device).index_add(0, ray, deltas[:total, 1].double())
    last = (plain[3].sum(dim=1) - 1)[plain[3][:, 1] > 0].long()
    expected = (plain[2][last, 0] - nears[ray[last]]).double()
    torch.testing.assert_close(reached[ray[last]], expected, rtol=0, atol=1e-4)

    sigmas, rgbs = 5 * torch.rand(len(xyzs), device=device), torch.rand(len(xyzs), 3, device=device)
    weights_sum, depth, image = torch_ngp.composite_rays_train(sigmas, rgbs, deltas, rays)
    expected = raymarching.composite_rays_train(sigmas[:total], rgbs[:total], *plain[2:])
    torch.testing.assert_close(weights_sum, expected[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(image, expected[3], rtol=0, atol=1e-5)
    torch.testing.assert_close(depth, expected[2] - nears.clamp(max=1e3) * expected[1], rtol=0, atol=1e-4)

    fewer = torch_ngp.march_rays_train(*given, None, total // 2, False, -1, False, 0.01, 128)
    assert len(fewer[0]) == total // 2
    sums = torch_ngp.composite_rays_train(sigmas[: total // 2], rgbs[: total // 2], *fewer[2:])[0]
    inside = rays[:, 1:].sum(dim=1) <= total // 2
    torch.testing.assert_close(sums, torch.where(inside, weights_sum, 0.0), rtol=0, atol=1e-6)
