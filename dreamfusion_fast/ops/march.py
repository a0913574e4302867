"""Marching rays through the occupancy grid to ordered, packed samples."""

import math

import torch
from torch import Tensor

from dreamfusion_fast.ops._checks import check_flag, check_number, check_same_length, check_tensor, positive_in
from dreamfusion_fast.ops._native import call, pointer
from dreamfusion_fast.ops.occupancy import bitfield_size, check_cells, check_order, occupancy_unpack
from dreamfusion_fast.ops.ray_box import ray_box_reference
from dreamfusion_fast.ops.tiles.march import MAX_STEPS, MarchedRays, count_samples, occupied_blocks

MAX_SAMPLES = 2**31 - 1  # offsets are int32
_MAX_CASCADES = 16


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
    cascades: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Equally spaced samples along rays, those in empty cells left out.

    Sample k of a ray is at distance ``t = t_near + (k + u) * step``, k = 0, 1, ..., and is kept when ``t < t_far`` and
    the cell that holds ``origin + t * direction`` is occupied. Outside the box nothing is. Empty cells are skipped
    analytically, which gives exactly the samples that visiting every k gives.

    With C cascades there are C grids of the same resolution (Mueller et al. 2022, appendix E.1): cascade c spans the
    box grown 2^c times about its centre. A sample is looked up in the first cascade whose box it lies in; outside the
    last one's, nothing is occupied. Which cascade that is depends on the position alone, never on the step, so that
    what is sampled does not change with it.

    On a GPU, this waits for it once, to learn how many samples there are. With a `capacity` it does not wait.

    Args:
        origins: ``[n_rays, 3]``, float32 or float64.
        directions: ``[n_rays, 3]``, same dtype; distances are in units of their length. All zero: no samples.
        t_near: ``[n_rays]``, same dtype; no samples where it is not finite, as on a miss of `ray_box`.
        t_far: ``[n_rays]``, same dtype.
        aabb: ``[6]``, (xmin, ymin, zmin, xmax, ymax, zmax), same dtype: the box that cascade 0 of the grid spans.
        bitfield: uint8 ``[ceil(cascades * resolution^3 / 8)]`` as `occupancy_pack` makes it; None = all cells are
            occupied.
        resolution: cells along each axis, 1 to 1290; even with several cascades.
        step: distance between samples, > 0. A ray has at most 2^24 steps.
        jitter: u is uniform in [0, 1), one number per ray from (seed, ray index), instead of 0.5.
        seed: 0 <= seed < 2^63.
        capacity: number of samples to make room for. None = as many as there are. With a number, `t` and
            `ray_indices` have this length whatever comes. ``offsets[-1]`` tells the true count: where it is above the
            capacity, samples are missing at the end, and the caller has to march again with more room; where it is
            below, the unused rest is t = 0 and the last ray's index.
        cascades: number of grids, 1 to 16, of less than 2^31 cells together.

    Returns:
        ``offsets`` int32 ``[n_rays + 1]``, exclusive prefix sum of the samples per ray; ``t [n_samples]``,
        ``ray_indices`` int32 ``[n_samples]``, both in the order of the rays and along each ray. No gradient flows
        through them.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
        RuntimeError: more than 2^31 - 1 samples, or the native core for this device was not built.
    """
    _check("march", origins, directions, t_near, t_far, aabb, bitfield, resolution, jitter, seed, capacity, cascades)
    _check_step("march", step, origins)
    rays = (origins.detach(), directions.detach(), t_near.detach(), t_far.detach(), aabb.detach())
    return _march(*rays, bitfield, resolution, step, jitter, seed, capacity, cascades)


def march_lattice(
    origins: Tensor,
    directions: Tensor,
    t_near: Tensor,
    t_far: Tensor,
    aabb: Tensor,
    bitfield: Tensor | None,
    resolution: int,
    distances: Tensor,
    jitter: bool = False,
    seed: int = 0,
    capacity: int | None = None,
    cascades: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Samples at given distances, the same for all rays, those in empty cells left out.

    Sample k of a ray is at ``t = d_k + u * (d_{k+1} - d_k)`` and is kept when ``t_near <= t < t_far`` and its cell is
    occupied. `rendering.cone_distances` makes distances that grow. All else is as in `march`.

    Args:
        distances: ``[n + 1]``, dtype of the rays: the edges d of n samples, rising, in the units of t.
        origins, directions, t_near, t_far, aabb, bitfield, resolution, jitter, seed, capacity, cascades: see `march`.

    Returns:
        ``offsets``, ``t`` and ``ray_indices`` as from `march`, and ``lengths [n_samples]``, ``d_{k+1} - d_k`` of each
        sample, for `composite`. The unused rest of a capacity has length 0.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range. Distances that do not rise, or
            are not finite, are found on the CPU only: on a GPU the check would wait.
        RuntimeError: more than 2^31 - 1 samples, or the native core for this device was not built.
    """
    _check(
        "march_lattice",
        origins,
        directions,
        t_near,
        t_far,
        aabb,
        bitfield,
        resolution,
        jitter,
        seed,
        capacity,
        cascades,
    )
    _check_distances("march_lattice", distances, origins)
    rays = (origins.detach(), directions.detach(), t_near.detach(), t_far.detach(), aabb.detach())
    return _march_lattice(*rays, bitfield, resolution, distances.detach(), jitter, seed, capacity, cascades)


def _check(
    op: str,
    origins: Tensor,
    directions: Tensor,
    t_near: Tensor,
    t_far: Tensor,
    aabb: Tensor,
    bitfield: Tensor | None,
    resolution: int,
    jitter: bool,
    seed: int,
    capacity: int | None,
    cascades: int,
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
    check_cells(op, resolution, cascades, _MAX_CASCADES)
    if cascades > 1 and resolution % 2 != 0:
        raise ValueError(f"{op}: resolution must be even with several cascades, got {resolution}")
    if bitfield is not None:
        check_tensor(op, "bitfield", bitfield, [bitfield_size(resolution, cascades)], (torch.uint8,), like=origins)
        check_order(op, bitfield, "linear")
    check_flag(op, "jitter", jitter)
    check_number(op, "seed", seed, "in [0, 2^63)", lambda number: 0 <= number < 2**63, whole=True)
    if capacity is not None:
        wanted = "between 0 and 2^31 - 1, or None"
        check_number(op, "capacity", capacity, wanted, lambda number: 0 <= number <= MAX_SAMPLES, whole=True)


def _check_step(op: str, step: float, origins: Tensor) -> None:
    check_number(op, "step", step, "a positive number", positive_in(origins.dtype))


def _check_distances(op: str, distances: Tensor, origins: Tensor) -> None:
    check_tensor(op, "distances", distances, ["n + 1"], like=origins, same_dtype=True)
    if not 1 <= distances.shape[0] <= MAX_STEPS + 1:
        raise ValueError(f"{op}: distances must be 1 to 2^24 + 1, got {distances.shape[0]}")


def _check_rising(distances: Tensor) -> None:
    """On the CPU alone, and inside the op, where tensors have values."""
    if distances.device.type == "cpu" and not bool(distances.isfinite().all() & (distances.diff() > 0).all()):
        raise ValueError("march_lattice: distances must be finite and rise")


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
    cascades: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    rays = (origins, directions, t_near, t_far, aabb)
    return _run(rays, None, bitfield, resolution, step, jitter, seed, capacity, cascades)[:3]


@torch.library.custom_op("dreamfusion_fast::march_lattice", mutates_args=())
def _march_lattice(
    origins: Tensor,
    directions: Tensor,
    t_near: Tensor,
    t_far: Tensor,
    aabb: Tensor,
    bitfield: Tensor | None,
    resolution: int,
    distances: Tensor,
    jitter: bool,
    seed: int,
    capacity: int | None,
    cascades: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_rising(distances)
    rays = (origins, directions, t_near, t_far, aabb)
    return _run(rays, distances, bitfield, resolution, 1.0, jitter, seed, capacity, cascades)


def _run(
    rays: tuple[Tensor, ...],
    distances: Tensor | None,
    bitfield: Tensor | None,
    resolution: int,
    step: float,
    jitter: bool,
    seed: int,
    capacity: int | None,
    cascades: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both ops; no lengths without distances."""
    distances = None if distances is None else distances.contiguous()
    bitfield = None if bitfield is None else bitfield.contiguous()
    blocks = None if bitfield is None else occupied_blocks(bitfield, resolution, cascades)
    origins, directions, t_near, t_far, aabb = (tensor.contiguous() for tensor in rays)
    # It holds what is copied here until the launches are made.
    marched = MarchedRays(
        origins, directions, t_near, t_far, aabb, bitfield, blocks, resolution, step, jitter, seed, cascades, distances
    )
    n_rays = len(marched)
    counts, firsts = count_samples(marched)
    totals = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int64), (1, 0))
    if capacity is None:
        size = int(totals[-1])  # the one wait for the GPU
        if size > MAX_SAMPLES:
            raise RuntimeError(f"march: {size} samples, more than 2^31 - 1: march fewer rays at once")
        t, ray_indices = origins.new_empty(size), counts.new_empty(size)
    else:
        size = capacity
        # A count past int32 must not become a negative index to write to.
        totals = totals.clamp(max=MAX_SAMPLES)
        t, ray_indices = origins.new_zeros(size), counts.new_full((size,), max(n_rays - 1, 0))
    lengths = origins.new_empty(0) if distances is None else torch.zeros_like(t)
    offsets = totals.to(torch.int32)
    if n_rays > 0 and size > 0:
        outputs = (pointer(t), 0 if distances is None else pointer(lengths), pointer(ray_indices), size)
        call("march_write", origins, marched.arguments, pointer(firsts), pointer(offsets), *outputs)
    return offsets, t, ray_indices, lengths


def _empty_outputs(origins: Tensor, capacity: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """For the fake tensors of both ops."""
    size = torch.library.get_ctx().new_dynamic_size() if capacity is None else capacity
    offsets = origins.new_empty(origins.shape[0] + 1, dtype=torch.int32)
    return offsets, origins.new_empty(size), origins.new_empty(size, dtype=torch.int32)


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
    cascades: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(origins, capacity)


@_march_lattice.register_fake
def _(
    origins: Tensor,
    directions: Tensor,
    t_near: Tensor,
    t_far: Tensor,
    aabb: Tensor,
    bitfield: Tensor | None,
    resolution: int,
    distances: Tensor,
    jitter: bool,
    seed: int,
    capacity: int | None,
    cascades: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    offsets, t, ray_indices = _empty_outputs(origins, capacity)
    return offsets, t, ray_indices, torch.empty_like(t)


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
    cascades: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The PyTorch twin of `march`: visits every k of every ray at once. Float32 or float64, any device.

    Every operation is done alone and in the order of the native core, because the results have to agree in every bit.
    """
    _check(
        "march_reference", origins, directions, t_near, t_far, aabb, bitfield, resolution, jitter, seed, None, cascades
    )
    _check_step("march_reference", step, origins)
    n_rays = origins.shape[0]
    steps = origins.new_full((), float(step))

    # How many k to visit: until t_far, or until the ray has left a box a little larger than the last cascade's.
    centre, half = 0.5 * (aabb[:3] + aabb[3:]), (0.5 + 1e-3) * 2 ** (cascades - 1) * (aabb[3:] - aabb[:3])
    _, leave = ray_box_reference(origins, directions, torch.cat([centre - half, centre + half]), near=-math.inf)
    crosses = t_near.isfinite() & ~t_far.isnan() & leave.isfinite()
    spans = torch.where(crosses, torch.minimum(t_far, leave) - t_near, -1.0)
    n_steps = int((spans / steps).ceil().amax().clamp(min=-2, max=MAX_STEPS - 2)) + 2 if n_rays > 0 else 0

    k = torch.arange(n_steps, device=origins.device).to(origins.dtype)
    t = t_near[:, None] + (k + offset_reference(origins, jitter, seed)[:, None]) * steps
    kept = crosses[:, None] & (t < t_far[:, None])
    kept = kept & _occupied_reference(origins, directions, t, aabb, bitfield, resolution, cascades)
    return _packed_reference(kept, t)


def march_lattice_reference(
    origins: Tensor,
    directions: Tensor,
    t_near: Tensor,
    t_far: Tensor,
    aabb: Tensor,
    bitfield: Tensor | None,
    resolution: int,
    distances: Tensor,
    jitter: bool = False,
    seed: int = 0,
    cascades: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The PyTorch twin of `march_lattice`, as `march_reference` is that of `march`."""
    op = "march_lattice_reference"
    _check(op, origins, directions, t_near, t_far, aabb, bitfield, resolution, jitter, seed, None, cascades)
    _check_distances(op, distances, origins)
    _check_rising(distances)
    lengths = distances.diff()
    t = distances[:-1] + offset_reference(origins, jitter, seed)[:, None] * lengths
    t = torch.minimum(t, distances[1:])
    kept = (t_near[:, None] <= t) & (t < t_far[:, None])
    kept = kept & (t_near.isfinite() & (directions != 0).any(dim=-1))[:, None]
    kept = kept & _occupied_reference(origins, directions, t, aabb, bitfield, resolution, cascades)
    return *_packed_reference(kept, t), lengths.expand_as(t)[kept]


def offset_reference(origins: Tensor, jitter: bool, seed: int) -> Tensor:
    """u of each ray."""
    if jitter:
        return uniform_reference(seed, torch.arange(origins.shape[0], device=origins.device), origins.dtype)
    return origins.new_full((origins.shape[0],), 0.5)


def _occupied_reference(
    origins: Tensor,
    directions: Tensor,
    t: Tensor,
    aabb: Tensor,
    bitfield: Tensor | None,
    resolution: int,
    cascades: int,
) -> Tensor:
    """Whether the samples at t ``[n_rays, n_steps]`` are in an occupied cell of the first cascade that holds them."""
    low, high = aabb[:3], aabb[3:]
    half = 0.5 * resolution
    position = (origins[:, None] + t[..., None] * directions[:, None] - low) * (
        origins.new_full((), resolution) / (high - low)
    )
    occupied = torch.zeros_like(t, dtype=torch.bool)
    outside = torch.ones_like(occupied)
    for cascade in range(cascades):
        own = position if cascade == 0 else (position - half) * 0.5**cascade + half
        here = outside & ((own >= 0) & (own < resolution)).all(dim=-1)
        outside = outside & ~here
        if bitfield is None:
            occupied = occupied | here
        else:
            x, y, z = torch.where(here[..., None], own, 0.0).long().unbind(dim=-1)
            grid = occupancy_unpack(bitfield, resolution, cascades).view(cascades, resolution, resolution, resolution)
            occupied = occupied | (here & grid[cascade, x, y, z])
    return occupied


def _packed_reference(kept: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets, distances and ray indices of the samples that are kept."""
    rays = torch.arange(t.shape[0], dtype=torch.int32, device=t.device)[:, None].expand_as(t)
    offsets = torch.nn.functional.pad(kept.sum(dim=1).cumsum(0), (1, 0)).to(torch.int32)
    return offsets, t[kept], rays[kept]
