"""Marching rays through an occupancy grid in Morton order, by the rules of torch-ngp's raymarching."""

import math

import torch
from torch import Tensor

from dreamfusion_fast.ops._checks import check_flag, check_number, check_same_length, check_tensor, positive_in
from dreamfusion_fast.ops._native import call, pointer
from dreamfusion_fast.ops.occupancy import check_order
from dreamfusion_fast.ops.tiles.march import MAX_STEPS

MAX_SAMPLES = 2**31 - 1  # offsets are int32
_MAX_CASCADES = 16


def march_morton(
    origins: Tensor,
    directions: Tensor,
    t_near: Tensor,
    t_far: Tensor,
    noise: Tensor,
    bitfield: Tensor,
    resolution: int,
    cascades: int,
    bound: float,
    min_step: float,
    max_step: float,
    cone_angle: float = 0.0,
    limit: int = 1024,
    contract: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Samples along rays by the rules that torch-ngp and its forks share, those in empty cells left out.

    Steps follow each other from ``t_near + noise * dt(t_near)`` on, as long as they begin before t_far, with
    ``dt(t) = clamp(t * cone_angle, min_step, max_step)``. A step is looked up at its beginning, whose coordinates are
    clamped to [-bound, bound], in the larger of two cascades: the first whose box ``[-2^c, 2^c]^3`` holds the position,
    and the first with ``dt * resolution < 2^(c + 1)``. The cells of cascade c span the cube of half size
    ``min(2^c, bound)``. Steps that begin before a ray leaves an empty cell are passed over without a look.

    On a GPU, this waits for it once, to learn how many samples there are.

    Args:
        origins: ``[n_rays, 3]``, float32 or float64.
        directions: ``[n_rays, 3]``, same dtype; distances are in units of their length.
        t_near, t_far: ``[n_rays]``, same dtype.
        noise: ``[n_rays]``, same dtype, in [0, 1): part of a step by which a ray's first one is put off.
        bitfield: uint8 ``[cascades * resolution^3 / 8]``; bit i of byte b is cell ``8 b + i``, and the cells of each
            cascade are in Morton order (`morton_index`). One that `occupancy_pack` made is refused.
        resolution: cells along each axis, a power of two from 2 to 1024.
        cascades: number of grids, 1 to 16, of less than 2^31 cells together.
        bound: half the size of the scene's cube, > 0.
        min_step, max_step: shortest and longest step, in units of t. A ray has at most 2^24 steps.
        cone_angle: how steps grow with the distance, 0 or more.
        limit: the most samples a ray has, 1 or more.
        contract: draw positions beyond [-1, 1]^3 into [-2, 2]^3: ``x (2 - 1 / m) / m``, m the largest coordinate.

    Returns:
        ``offsets`` int32 ``[n_rays + 1]``, exclusive prefix sum of the samples per ray; ``positions [m, 3]``, where the
        steps begin; ``spans [m, 2]``, of each the distance at its end, and its length; ``ray_indices`` int32 ``[m]``.
        All in the order of the rays and along each. No gradient flows through them.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
        RuntimeError: more than 2^31 - 1 samples, or the native core for this device was not built.
    """
    numbers = (resolution, cascades, bound, min_step, max_step, cone_angle, limit, contract)
    _check("march_morton", origins, directions, t_near, t_far, noise, bitfield, *numbers)
    rays = (origins.detach(), directions.detach(), t_near.detach(), t_far.detach(), noise.detach())
    return _march_morton(*rays, bitfield, *numbers)


def march_morton_rows(
    origins: Tensor,
    directions: Tensor,
    t_near: Tensor,
    t_far: Tensor,
    noise: Tensor,
    bitfield: Tensor,
    resolution: int,
    cascades: int,
    bound: float,
    min_step: float,
    max_step: float,
    cone_angle: float = 0.0,
    limit: int = 1024,
    contract: bool = False,
) -> tuple[Tensor, Tensor]:
    """The samples of `march_morton` in as many rows for each ray as the limit allows. It waits for nothing.

    Args:
        origins, directions, t_near, t_far, noise, bitfield, resolution, cascades, bound, min_step, max_step,
            cone_angle, limit, contract: see `march_morton`.

    Returns:
        ``positions [n_rays, limit, 3]`` and ``spans [n_rays, limit, 2]``, zeros behind a ray's last sample.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
        RuntimeError: the native core for this device was not built.
    """
    numbers = (resolution, cascades, bound, min_step, max_step, cone_angle, limit, contract)
    _check("march_morton_rows", origins, directions, t_near, t_far, noise, bitfield, *numbers)
    rays = (origins.detach(), directions.detach(), t_near.detach(), t_far.detach(), noise.detach())
    return _march_morton_rows(*rays, bitfield, *numbers)


def morton_index(cells: Tensor) -> Tensor:
    """The places of cells in Morton order: bits of x, y and z in turn, that of x lowest.

    Args:
        cells: integers ``[..., 3]``, each in [0, 1024).

    Returns:
        int64 ``[...]``.
    """
    spread = cells.long()
    for shift, mask in ((16, 0x030000FF), (8, 0x0300F00F), (4, 0x030C30C3), (2, 0x09249249)):
        spread = (spread | (spread << shift)) & mask
    return spread[..., 0] | (spread[..., 1] << 1) | (spread[..., 2] << 2)


def morton_cells(indices: Tensor) -> Tensor:
    """The cells ``[..., 3]``, int64, of places in Morton order: the inverse of `morton_index`."""
    bits = torch.stack([indices.long() >> axis for axis in range(3)], dim=-1) & 0x09249249
    for shift, mask in ((2, 0x030C30C3), (4, 0x0300F00F), (8, 0x030000FF), (16, 0x3FF)):
        bits = (bits | (bits >> shift)) & mask
    return bits


def _check(
    op: str,
    origins: Tensor,
    directions: Tensor,
    t_near: Tensor,
    t_far: Tensor,
    noise: Tensor,
    bitfield: Tensor,
    resolution: int,
    cascades: int,
    bound: float,
    min_step: float,
    max_step: float,
    cone_angle: float,
    limit: int,
    contract: bool,
) -> None:
    check_tensor(op, "origins", origins, ["n_rays", 3])
    rows: list[tuple[str, Tensor, list[int | str]]] = [
        ("directions", directions, ["n_rays", 3]),
        ("t_near", t_near, ["n_rays"]),
        ("t_far", t_far, ["n_rays"]),
        ("noise", noise, ["n_rays"]),
    ]
    for name, tensor, shape in rows:
        check_tensor(op, name, tensor, shape, like=origins, same_dtype=True)
        check_same_length(op, name, tensor, "origins", origins)
    wanted = "a power of two from 2 to 1024"
    check_number(
        op, "resolution", resolution, wanted, lambda number: number in [2**bits for bits in range(1, 11)], whole=True
    )
    wanted = f"between 1 and {_MAX_CASCADES}"
    check_number(op, "cascades", cascades, wanted, lambda number: 1 <= number <= _MAX_CASCADES, whole=True)
    if cascades * resolution**3 >= 2**31:
        raise ValueError(f"{op}: cascades must be of less than 2^31 cells together, got {cascades} of {resolution}^3")
    check_tensor(op, "bitfield", bitfield, [cascades * resolution**3 // 8], (torch.uint8,), like=origins)
    check_order(op, bitfield, "morton")
    positive = positive_in(origins.dtype)
    check_number(op, "bound", bound, "positive and finite", positive)
    check_number(op, "min_step", min_step, "positive and finite", positive)
    check_number(op, "max_step", max_step, "positive and finite", positive)
    most = torch.finfo(origins.dtype).max
    check_number(op, "cone_angle", cone_angle, "0 or more, and finite", lambda number: 0 <= number <= most)
    wanted = "between 1 and 2^31 - 1"
    check_number(op, "limit", limit, wanted, lambda number: 1 <= number <= MAX_SAMPLES, whole=True)
    if op.startswith("march_morton_rows") and origins.shape[0] * limit > MAX_SAMPLES:
        raise ValueError(f"{op}: limit must be of at most 2^31 - 1 rows together, got {limit} of each ray")
    check_flag(op, "contract", contract)


def _packed(
    tensors: tuple[Tensor, ...],
    bitfield: Tensor,
    resolution: int,
    cascades: int,
    bound: float,
    min_step: float,
    max_step: float,
    cone_angle: float,
    limit: int,
    contract: bool,
) -> tuple[object, ...]:
    """The struct of the rays, as the native functions take it; the tensors are contiguous."""
    addresses = (*(pointer(tensor) for tensor in tensors), pointer(bitfield))
    numbers = (resolution, cascades, bound, cone_angle, min_step, max_step, limit, bool(contract))
    return (*addresses, *numbers, tensors[0].shape[0])


@torch.library.custom_op("dreamfusion_fast::march_morton", mutates_args=())
def _march_morton(
    origins: Tensor,
    directions: Tensor,
    t_near: Tensor,
    t_far: Tensor,
    noise: Tensor,
    bitfield: Tensor,
    resolution: int,
    cascades: int,
    bound: float,
    min_step: float,
    max_step: float,
    cone_angle: float,
    limit: int,
    contract: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = tuple(tensor.contiguous() for tensor in (origins, directions, t_near, t_far, noise))
    bitfield = bitfield.contiguous()
    numbers = (resolution, cascades, bound, min_step, max_step, cone_angle, limit, contract)
    rays = _packed(tensors, bitfield, *numbers)
    counts = origins.new_empty(origins.shape[0], dtype=torch.int32)
    if counts.numel() > 0:
        call("morton_count", origins, rays, pointer(counts))
    totals = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int64), (1, 0))
    size = int(totals[-1])  # the one wait for the GPU
    if size > MAX_SAMPLES:
        raise RuntimeError(f"march_morton: {size} samples, more than 2^31 - 1: march fewer rays at once")
    offsets = totals.to(torch.int32)
    positions, spans = origins.new_empty(size, 3), origins.new_empty(size, 2)
    ray_indices = counts.new_empty(size)
    if size > 0:
        outputs = (pointer(positions), pointer(spans), pointer(ray_indices))
        call("morton_write", origins, rays, pointer(offsets), *outputs)
    return offsets, positions, spans, ray_indices


@_march_morton.register_fake
def _(
    origins: Tensor,
    directions: Tensor,
    t_near: Tensor,
    t_far: Tensor,
    noise: Tensor,
    bitfield: Tensor,
    resolution: int,
    cascades: int,
    bound: float,
    min_step: float,
    max_step: float,
    cone_angle: float,
    limit: int,
    contract: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    offsets = origins.new_empty(origins.shape[0] + 1, dtype=torch.int32)
    return offsets, origins.new_empty(size, 3), origins.new_empty(size, 2), offsets.new_empty(size)


@torch.library.custom_op("dreamfusion_fast::march_morton_rows", mutates_args=())
def _march_morton_rows(
    origins: Tensor,
    directions: Tensor,
    t_near: Tensor,
    t_far: Tensor,
    noise: Tensor,
    bitfield: Tensor,
    resolution: int,
    cascades: int,
    bound: float,
    min_step: float,
    max_step: float,
    cone_angle: float,
    limit: int,
    contract: bool,
) -> tuple[Tensor, Tensor]:
    tensors = tuple(tensor.contiguous() for tensor in (origins, directions, t_near, t_far, noise))
    bitfield, n_rays = bitfield.contiguous(), origins.shape[0]
    numbers = (resolution, cascades, bound, min_step, max_step, cone_angle, limit, contract)
    positions, spans = origins.new_zeros(n_rays, limit, 3), origins.new_zeros(n_rays, limit, 2)
    if n_rays > 0:
        rays = _packed(tensors, bitfield, *numbers)
        call("morton_write", origins, rays, 0, pointer(positions), pointer(spans), 0)
    return positions, spans


@_march_morton_rows.register_fake
def _(
    origins: Tensor,
    directions: Tensor,
    t_near: Tensor,
    t_far: Tensor,
    noise: Tensor,
    bitfield: Tensor,
    resolution: int,
    cascades: int,
    bound: float,
    min_step: float,
    max_step: float,
    cone_angle: float,
    limit: int,
    contract: bool,
) -> tuple[Tensor, Tensor]:
    n_rays = origins.shape[0]
    return origins.new_empty(n_rays, limit, 3), origins.new_empty(n_rays, limit, 2)


def march_morton_reference(
    origins: Tensor,
    directions: Tensor,
    t_near: Tensor,
    t_far: Tensor,
    noise: Tensor,
    bitfield: Tensor,
    resolution: int,
    cascades: int,
    bound: float,
    min_step: float,
    max_step: float,
    cone_angle: float = 0.0,
    limit: int = 1024,
    contract: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The PyTorch twin of `march_morton`: all rays step together. Float32 or float64, any device.

    Every operation is done alone and in the order of the native core, because the results have to agree in every bit.
    """
    numbers = (resolution, cascades, bound, min_step, max_step, cone_angle, limit, contract)
    _check("march_morton_reference", origins, directions, t_near, t_far, noise, bitfield, *numbers)
    kept, positions, spans = _visit(origins, directions, t_near, t_far, noise, bitfield, *numbers)
    offsets = torch.nn.functional.pad(kept.sum(dim=1).cumsum(0), (1, 0)).to(torch.int32)
    indices = torch.arange(origins.shape[0], dtype=torch.int32, device=origins.device)[:, None].expand_as(kept)
    return offsets, positions[kept], spans[kept], indices[kept]


def march_morton_rows_reference(
    origins: Tensor,
    directions: Tensor,
    t_near: Tensor,
    t_far: Tensor,
    noise: Tensor,
    bitfield: Tensor,
    resolution: int,
    cascades: int,
    bound: float,
    min_step: float,
    max_step: float,
    cone_angle: float = 0.0,
    limit: int = 1024,
    contract: bool = False,
) -> tuple[Tensor, Tensor]:
    """The PyTorch twin of `march_morton_rows`. Float32 or float64, any device."""
    numbers = (resolution, cascades, bound, min_step, max_step, cone_angle, limit, contract)
    _check("march_morton_rows_reference", origins, directions, t_near, t_far, noise, bitfield, *numbers)
    kept, positions, spans = _visit(origins, directions, t_near, t_far, noise, bitfield, *numbers)
    ray, _ = kept.nonzero(as_tuple=True)
    place = (kept.cumsum(dim=1) - 1)[kept]
    rows = origins.new_zeros(origins.shape[0], limit, 3), origins.new_zeros(origins.shape[0], limit, 2)
    rows[0][ray, place], rows[1][ray, place] = positions[kept], spans[kept]
    return rows


def _visit(
    origins: Tensor,
    directions: Tensor,
    t_near: Tensor,
    t_far: Tensor,
    noise: Tensor,
    bitfield: Tensor,
    resolution: int,
    cascades: int,
    bound: float,
    min_step: float,
    max_step: float,
    cone_angle: float,
    limit: int,
    contract: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Whether each step is kept, its position and its span, ``[n_rays, n_steps, ...]``."""
    origins, directions, t_near, t_far, noise = (x.detach() for x in (origins, directions, t_near, t_far, noise))
    one = origins.new_ones(())
    # A tensor takes no int beyond 64 bits, which the op takes where a float is meant.
    numbers = (float(x) for x in (resolution, bound, min_step, max_step, cone_angle))
    size, half_bound, shortest, longest, angle = (one * x for x in numbers)

    def step_at(t: Tensor) -> Tensor:
        return torch.fmin(longest, torch.fmax(shortest, t * angle))

    def level_of(extent: Tensor) -> Tensor:
        return sum((extent >= 2**cascade for cascade in range(cascades - 1)), torch.zeros_like(extent).long())

    t = t_near + step_at(t_near) * noise
    until, count = torch.full_like(t, -math.inf), torch.zeros_like(t, dtype=torch.int64)
    going = torch.ones_like(t, dtype=torch.bool)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(MAX_STEPS):
        dt = step_at(t)
        end = t + dt
        going = going & (count < limit) & (t < t_far) & (end > t)
        if not bool(going.any()):
            break
        look = going & ~(t < until)
        position = torch.fmin(half_bound, torch.fmax(-half_bound, origins + t[:, None] * directions))
        largest = torch.fmax(position.abs().amax(dim=1), one * 0)
        level = torch.maximum(level_of(largest), level_of(dt * size * 0.5))
        half = torch.fmin((2**level).to(t.dtype), half_bound)[:, None]
        contracted = (largest > 1) & bool(contract)
        scale = (2 - 1 / largest) / largest
        position = torch.where(contracted[:, None], position * scale[:, None], position)
        own = 0.5 * (position * (1 / half) + 1) * size
        cell = torch.fmin(size - 1, torch.fmax(one * 0, own)).long()
        wall = cell.to(t.dtype) + 0.5 + torch.copysign(one * 0.5, directions)
        times = ((wall * (1 / size) * 2 - 1) * half - position) * (1 / directions)
        leave = torch.fmin(torch.fmin(times[:, 0], times[:, 1]), torch.fmin(times[:, 2], one * math.inf))
        bit = level * resolution**3 + morton_index(cell)
        occupied = look & (((bitfield[bit >> 3].long() >> (bit & 7)) & 1) == 1)
        count = count + occupied
        until = torch.where(look & ~occupied & ~contracted, t + torch.fmax(leave, one * 0), until)
        found.append((occupied, position, torch.stack([end, dt], dim=1)))
        t = torch.where(going, end, t)
    if not found:
        nothing = origins.new_zeros(origins.shape[0], 0, 3)
        return nothing[..., 0].bool(), nothing, nothing[..., :2]
    kept, positions, spans = (torch.stack(parts, dim=1) for parts in zip(*found, strict=True))
    return kept, positions, spans
