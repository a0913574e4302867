from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.ops import march, march_reference, ray_box, ray_box_reference
from dreamfusion_fast.ops.ray_box import _ray_box, native_ray_box

DTYPES = [torch.float32, torch.float64]
SIZES = [0, 1, 113, 1023]
BOXES = [(-1.0, -1.0, -1.0, 1.0, 1.0, 1.0), (-0.7, -1.1, -0.3, 0.9, 1.3, 2.2)]


def make_rays(n: int, dtype: torch.dtype, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    """Rays from inside and outside the boxes, some with direction components of exactly zero."""
    origins = spread * torch.randn(n, 3, dtype=dtype)
    directions = torch.nn.functional.normalize(torch.randn(n, 3, dtype=dtype), dim=-1)
    directions[torch.rand(n, 3) < 0.15] = 0.0
    return origins, directions


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("box", BOXES)
def test_equals_its_twin_in_every_bit(n: int, dtype: torch.dtype, box: tuple[float, ...], device: torch.device) -> None:
    origins, directions = (tensor.to(device) for tensor in make_rays(n, dtype))
    aabb = torch.tensor(box, dtype=dtype, device=device)
    for near, far in [(0.0, math.inf), (0.3, 1.7), (-math.inf, math.inf)]:
        expected = ray_box_reference(origins, directions, aabb, near, far)
        for op in (ray_box, native_ray_box):
            found = op(origins, directions, aabb, near, far)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0)
    if n == 1023:
        hits = found[0].isfinite()
        assert hits.any()
        assert not hits.all()


def test_known_distances(device: torch.device) -> None:
    rays = [
        ([-3.0, 0.0, 0.0], [1.0, 0.0, 0.0], (2.0, 4.0)),  # through the middle
        ([0.0, 0.0, 0.0], [0.0, 0.0, -1.0], (0.0, 1.0)),  # from inside
        ([3.0, 0.0, 0.0], [1.0, 0.0, 0.0], (math.inf, math.inf)),  # away from it
        ([0.0, 2.0, 0.0], [1.0, 0.0, 0.0], (math.inf, math.inf)),  # beside it, parallel to a side
        ([-2.0, 0.0, 1.0], [1.0, 0.0, 0.0], (1.0, 3.0)),  # within a side
        ([0.0, 2.0, 0.0], [1.0, -1.0, 0.0], (math.inf, math.inf)),  # touches an edge
        ([0.0, 0.0, 0.0], [math.nan, 0.0, 1.0], (math.inf, math.inf)),
    ]
    origins = torch.tensor([ray[0] for ray in rays], device=device)
    directions = torch.tensor([ray[1] for ray in rays], device=device)
    t_near, t_far = ray_box(origins, directions, torch.tensor(BOXES[0], device=device))
    assert list(zip(t_near.tolist(), t_far.tolist(), strict=True)) == [ray[2] for ray in rays]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("resolution", [1, 7, 16])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("box", BOXES)
def test_rays_in_a_face_hit_it_and_are_sampled_in_a_lower_one(
    native: bool, resolution: int, axis: int, box: tuple[float, ...], device: torch.device
) -> None:
    """Half-open cells: of two boxes side by side, one has the samples of the face between them."""
    aabb = torch.tensor(box, device=device)
    centre, extent = 0.5 * (aabb[:3] + aabb[3:]), aabb[3:] - aabb[:3]
    along = (axis + 1) % 3
    origins = centre.repeat(2, 1)
    origins[0, axis], origins[1, axis] = aabb[axis], aabb[axis + 3]
    directions = torch.zeros(2, 3, device=device)
    directions[:, along] = 1.0
    meet, sample = (ray_box, march) if native else (ray_box_reference, march_reference)
    t_near, t_far = meet(origins, directions, aabb, near=-math.inf)
    torch.testing.assert_close(t_far - t_near, extent[along].expand(2))
    step = float(extent[along]) / 11.5
    offsets, t, _ = sample(origins, directions, t_near, t_far, aabb, None, resolution, step)
    assert offsets.tolist() == [0, 11, 11]
    upper = aabb.clone()
    upper[axis], upper[axis + 3] = aabb[axis + 3], aabb[axis + 3] + 1.0
    offsets, next_t, _ = sample(origins, directions, t_near, t_far, upper, None, resolution, step)
    assert offsets.tolist() == [0, 0, 11]
    assert torch.equal(t, next_t)


def test_ends_lie_on_the_box(device: torch.device) -> None:
    origins, directions = (tensor.to(device) for tensor in make_rays(1023, torch.float64))
    t_near, t_far = ray_box(
        origins, directions, torch.tensor(BOXES[0], dtype=torch.float64, device=device), near=-math.inf
    )
    hits = t_near.isfinite()
    for t in (t_near[hits], t_far[hits]):
        ends = origins[hits] + t[:, None] * directions[hits]
        torch.testing.assert_close(ends.abs().amax(dim=-1), torch.ones_like(t), rtol=0, atol=1e-13)


def test_non_contiguous_rays(device: torch.device) -> None:
    origins, directions = (tensor.to(device) for tensor in make_rays(113, torch.float32))
    aabb = torch.tensor(BOXES[0], device=device)
    expected = ray_box(origins, directions, aabb)
    strided = [tensor.t().contiguous().t() for tensor in (origins, directions)]
    assert not strided[0].is_contiguous()
    for one, other in zip(ray_box(*strided, aabb), expected, strict=True):
        assert torch.equal(one, other)


def test_twin_gradient() -> None:
    origins, directions = make_rays(40, torch.float64)
    aabb = torch.tensor(BOXES[1], dtype=torch.float64)
    hits = ray_box_reference(origins, directions, aabb, near=-math.inf)[0].isfinite() & (directions != 0).all(dim=-1)
    assert hits.sum() > 3
    inputs = (origins[hits].requires_grad_(), directions[hits].requires_grad_(), aabb.requires_grad_())
    assert torch.autograd.gradcheck(lambda *args: ray_box_reference(*args, near=-math.inf), inputs)


def test_no_gradient_flows() -> None:
    origins, directions = make_rays(3, torch.float32)
    t_near, _ = ray_box(origins.requires_grad_(), directions, torch.tensor(BOXES[0]))
    assert not t_near.requires_grad


def test_opcheck(device: torch.device) -> None:
    origins, directions = (tensor.to(device) for tensor in make_rays(13, torch.float32))
    torch.library.opcheck(_ray_box, (origins, directions, torch.tensor(BOXES[0], device=device), 0.0, 2.0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"origins": torch.zeros(4)}, ValueError, r"origins must have shape \[n_rays, 3\], got \[4\]"),
        ({"directions": torch.zeros(5, 3)}, ValueError, "directions has 5 rows, origins has 4"),
        ({"directions": torch.zeros(4, 3).double()}, TypeError, "directions must be torch.float32, got torch.float64"),
        ({"origins": torch.zeros(4, 3).half()}, TypeError, "origins must be torch.float32 or torch.float64"),
        ({"aabb": torch.zeros(4)}, ValueError, r"aabb must have shape \[6\]"),
        ({"aabb": [0.0] * 6}, TypeError, "aabb must be a torch.Tensor, got list"),
        ({"aabb": torch.zeros(6, device="meta")}, ValueError, "aabb is on meta, the other arguments are on cpu"),
        ({"near": math.nan}, ValueError, "near must be a number, got nan"),
    ],
)
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"origins": torch.zeros(4, 3), "directions": torch.ones(4, 3), "aabb": torch.tensor(BOXES[0])}
    with pytest.raises(error, match=message):
        ray_box(**{**arguments, **change})
