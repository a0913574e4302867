"""Marching rays through the occupancy grid to ordered, packed samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dreamfusion_fast.ops._checks import check_same_length, check_tensor
from dreamfusion_fast.ops._native import call, pointer
from dreamfusion_fast.ops.occupancy import occupancy_unpack
from dreamfusion_fast.ops.ray_box import ray_box_reference

_MAX_STEPS = 1 << 24  # steps of one ray; up to here float32 counts them exactly (kMaxSteps in march.h)
BLOCK = 8  # cells along a block (kBlock in march.h)
_MAX_SAMPLES = 2**31 - 1  # offsets are int32


def march(
    origins: Tensor,
    directions: Tensor,
    t_near: Tensor,
    t_far: Tensor,
    aabb: Tensor,
    bitfield: Tensor | None,
    resolution: int,
    step: float,
    jitter: bool = False,
    seed: int = 0,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Equally spaced samples along rays, those in empty cells left out.

    Sample k of a ray is at distance ``t = t_near + (k + u) * step``, k = 0, 1, ..., and is kept when ``t < t_far`` and
    the cell that holds ``origin + t * direction`` is occupied. Outside the box nothing is. Empty cells are skipped
    analytically, which gives exactly the samples that visiting every k gives.

    On a GPU, this waits for it once, to learn how many samples there are. With a `capacity` it does not wait.

    Args:
        origins: ``[n_rays, 3]``, float32 or float64.
        directions: ``[n_rays, 3]``, same dtype; distances are in units of their length. All zero: no samples.
        t_near: ``[n_rays]``, same dtype; no samples where it is not finite, as on a miss of `ray_box`.
        t_far: ``[n_rays]``, same dtype.
        aabb: ``[6]``, (xmin, ymin, zmin, xmax, ymax, zmax), same dtype: the box the grid spans.
        bitfield: uint8 ``[ceil(resolution^3 / 8)]`` as `occupancy_pack` makes it; None = all cells are occupied.
        resolution: cells along each axis, 1 to 1290.
        step: distance between samples, > 0. A ray has at most 2^24 steps.
        jitter: u is uniform in [0, 1), one number per ray from (seed, ray index), instead of 0.5.
        seed: 0 <= seed < 2^63.
        capacity: number of samples to make room for. None = as many as there are. With a number, `t` and
            `ray_indices` have this length whatever comes. ``offsets[-1]`` tells the true count: where it is above the
            capacity, samples are missing at the end, and the caller has to march again with more room; where it is
            below, the unused rest is t = 0 and the last ray's index.

    Returns:
        ``offsets`` int32 ``[n_rays + 1]``, exclusive prefix sum of the samples per ray; ``t [n_samples]``,
        ``ray_indices`` int32 ``[n_samples]``, both in the order of the rays and along each ray. No gradient flows
        through them.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
        RuntimeError: more than 2^31 - 1 samples, or the native core for this device was not built.
    """
    _check("march", origins, directions, t_near, t_far, aabb, bitfield, resolution, step, seed)
    if capacity is not None and not 0 <= capacity <= _MAX_SAMPLES:
        raise ValueError(f"dreamfusion_fast.ops.march: capacity must be between 0 and 2^31 - 1, got {capacity}")
    rays = (origins.detach(), directions.detach(), t_near.detach(), t_far.detach(), aabb.detach())
    return _march(*rays, bitfield, resolution, step, jitter, seed, capacity)


def _check(
    op: str,
    origins: Tensor,
    directions: Tensor,
    t_near: Tensor,
    t_far: Tensor,
    aabb: Tensor,
    bitfield: Tensor | None,
    resolution: int,
    step: float,
    seed: int,
) -> None:
    check_tensor(op, "origins", origins, ["n_rays", 3])
    rows: list[tuple[str, Tensor, list[int | str]]] = [
        ("directions", directions, ["n_rays", 3]),
        ("t_near", t_near, ["n_rays"]),
        ("t_far", t_far, ["n_rays"]),
    ]
    for name, tensor, shape in rows:
        check_tensor(op, name, tensor, shape, like=origins, same_dtype=True)
        check_same_length(op, name, tensor, "origins", origins)
    check_tensor(op, "aabb", aabb, [6], like=origins, same_dtype=True)
    if not 1 <= resolution <= 1290:
        raise ValueError(f"dreamfusion_fast.ops.{op}: resolution must be between 1 and 1290, got {resolution}")
    if bitfield is not None:
        check_tensor(op, "bitfield", bitfield, [(resolution**3 + 7) // 8], (torch.uint8,), like=origins)
    if not (step > 0.0 and math.isfinite(step)):
        raise ValueError(f"dreamfusion_fast.ops.{op}: step must be a positive number, got {step}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"dreamfusion_fast.ops.{op}: seed must be in [0, 2^63), got {seed}")


@torch.library.custom_op("dreamfusion_fast::march", mutates_args=())
def _march(
    origins: Tensor,
    directions: Tensor,
    t_near: Tensor,
    t_far: Tensor,
    aabb: Tensor,
    bitfield: Tensor | None,
    resolution: int,
    step: float,
    jitter: bool,
    seed: int,
    capacity: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    # Held in a list until the launches are made: a copy made here must outlive its address.
    tensors = [tensor.contiguous() for tensor in (origins, directions, t_near, t_far, aabb)]
    blocks = None
    if bitfield is not None:
        bitfield = bitfield.contiguous()
        blocks = bitfield.new_empty(((resolution + BLOCK - 1) // BLOCK) ** 3)
        call("march_blocks", bitfield, pointer(bitfield), resolution, pointer(blocks))
    n_rays = origins.shape[0]
    rays = (*map(pointer, (*tensors, bitfield, blocks)), resolution, step, jitter, seed, n_rays)

    counts, firsts = origins.new_empty((2, n_rays), dtype=torch.int32)
    if n_rays > 0:
        call("march_count", origins, *rays, pointer(counts), pointer(firsts))
    totals = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int64), (1, 0))
    if capacity is None:
        size = int(totals[-1])  # the one wait for the GPU
        if size > _MAX_SAMPLES:
            raise RuntimeError(
                f"dreamfusion_fast.ops.march: {size} samples, more than 2^31 - 1: march fewer rays at once"
            )
        t, ray_indices = origins.new_empty(size), counts.new_empty(size)
    else:
        size = capacity
        # A count past int32 must not become a negative place to write to.
        totals = totals.clamp(max=_MAX_SAMPLES)
        t, ray_indices = origins.new_zeros(size), counts.new_full((size,), max(n_rays - 1, 0))
    offsets = totals.to(torch.int32)
    if n_rays > 0 and size > 0:
        call("march_write", origins, *rays, pointer(firsts), pointer(offsets), pointer(t), pointer(ray_indices), size)
    return offsets, t, ray_indices


@_march.register_fake
def _(
    origins: Tensor,
    directions: Tensor,
    t_near: Tensor,
    t_far: Tensor,
    aabb: Tensor,
    bitfield: Tensor | None,
    resolution: int,
    step: float,
    jitter: bool,
    seed: int,
    capacity: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size() if capacity is None else capacity
    offsets = origins.new_empty(origins.shape[0] + 1, dtype=torch.int32)
    return offsets, origins.new_empty(size), origins.new_empty(size, dtype=torch.int32)


def uniform_reference(seed: int, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers in [0, 1) from (seed, index): the twin of ``uniform`` in ``csrc/include/dreamfusion_fast/random.h``.

    Args:
        seed: 0 <= seed < 2^63.
        indices: int64 ``[n]``, each in [0, 2^32).
        dtype: of the result; its values are the same in all that hold 24 bits.
    """

    def pcg_hash(value: Tensor) -> Tensor:
        state = (value * 747796405 + 2891336453) & 0xFFFFFFFF
        word = (((state >> ((state >> 28) + 4)) ^ state) * 277803737) & 0xFFFFFFFF
        return (word >> 22) ^ word

    low, high = (torch.tensor(part, device=indices.device) for part in (seed & 0xFFFFFFFF, seed >> 32))
    key = pcg_hash(low ^ pcg_hash(high))
    return (pcg_hash(key ^ pcg_hash(indices)) >> 8).to(dtype) * 2.0**-24


def march_reference(
    origins: Tensor,
    directions: Tensor,
    t_near: Tensor,
    t_far: Tensor,
    aabb: Tensor,
    bitfield: Tensor | None,
    resolution: int,
    step: float,
    jitter: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The PyTorch twin of `march`: visits every k of every ray at once. Float32 or float64, any device.

    Every operation is done alone and in the order of the native core, because the results have to agree in every bit.
    """
    _check("march_reference", origins, directions, t_near, t_far, aabb, bitfield, resolution, step, seed)
    n_rays, device, dtype = origins.shape[0], origins.device, origins.dtype
    low, high = aabb[:3], aabb[3:]
    steps = origins.new_full((), step)
    offset = origins.new_full((n_rays,), 0.5)
    if jitter:
        offset = uniform_reference(seed, torch.arange(n_rays, device=device), dtype)

    # How many k to visit: until t_far, or until the ray has left a box a little larger than the scene's.
    margin = 1e-3 * (high - low)
    _, leave = ray_box_reference(origins, directions, torch.cat([low - margin, high + margin]), near=-math.inf)
    crosses = t_near.isfinite() & ~t_far.isnan() & leave.isfinite()
    spans = torch.where(crosses, torch.minimum(t_far, leave) - t_near, -1.0)
    n_steps = int((spans / steps).ceil().amax().clamp(min=-2, max=_MAX_STEPS - 2)) + 2 if n_rays > 0 else 0

    k = torch.arange(n_steps, device=device).to(dtype)
    t = t_near[:, None] + (k + offset[:, None]) * steps
    place = (origins[:, None] + t[..., None] * directions[:, None] - low) * (
        origins.new_full((), resolution) / (high - low)
    )
    kept = crosses[:, None] & (t < t_far[:, None]) & ((place >= 0) & (place < resolution)).all(dim=-1)
    if bitfield is not None:
        x, y, z = torch.where(kept[..., None], place, 0.0).long().unbind(dim=-1)
        kept = kept & occupancy_unpack(bitfield, resolution)[x, y, z]
    ray_indices = torch.arange(n_rays, dtype=torch.int32, device=device)[:, None].expand(-1, n_steps)[kept]
    offsets = torch.nn.functional.pad(kept.sum(dim=1).cumsum(0), (1, 0)).to(torch.int32)
    return offsets, t[kept], ray_indices
