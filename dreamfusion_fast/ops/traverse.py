"""Rays through levels of an occupancy grid, each ray with steps of its own, to ordered, packed intervals."""

import math

import torch
from torch import Tensor

from dreamfusion_fast.ops._checks import check_number, check_same_length, check_tensor, positive_in
from dreamfusion_fast.ops._native import call, pointer
from dreamfusion_fast.ops.ray_box import ray_box_reference
from dreamfusion_fast.ops.tiles.march import MAX_STEPS

MAX_SAMPLES = 2**31 - 1  # offsets are int32


def traverse(
    origins: Tensor,
    directions: Tensor,
    t_near: Tensor,
    t_far: Tensor,
    boxes: Tensor,
    occupied: Tensor,
    step: float,
    cone_angle: float = 0.0,
    max_step: float = math.inf,
    limit: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Intervals along rays, those in empty cells left out.

    Steps follow each other from ``t_0 = t_near`` on: ``t_{k+1} = t_k + dt_k``,
    ``dt_k = clamp(t_k * cone_angle, step, max_step)``. An interval ``[t_k, t_{k+1}]`` is kept when its middle is before
    t_far and in an occupied cell of the first level whose box holds it; outside of all boxes nothing is occupied. So
    the last interval may reach beyond t_far by half its length. Boxes need not be cubes, nor lie within each other.
    Empty space is skipped, which gives exactly the intervals that visiting every step gives. The rules are those of
    ``traverse_grids`` in nerfacc 0.5 (Li et al. 2023), but distances of equal steps are ``t_near + k * step``, and do
    not drift.

    With a step of 0 or less, there is one interval for each occupied cell that the ray crosses, from its entry to its
    exit; of a coarser level, for each part of a cell's way that no finer level's box covers.

    On a GPU, this waits for it once, to learn how many intervals there are.

    Args:
        origins: ``[n_rays, 3]``, float32 or float64.
        directions: ``[n_rays, 3]``, same dtype; distances are in units of their length. All zero: no intervals.
        t_near: ``[n_rays]``, same dtype, also 0 or less; no intervals where it is not finite.
        t_far: ``[n_rays]``, same dtype.
        boxes: ``[L, 6]``, (xmin, ymin, zmin, xmax, ymax, zmax) of each level, same dtype; the first one that holds a
            point decides. One without extent holds nothing.
        occupied: bool ``[L, X, Y, Z]``, of less than 2^31 cells.
        step: the shortest step; 0 or less for one interval for each cell. A ray has at most 2^24 steps.
        cone_angle: how steps grow with the distance, 0 or more.
        max_step: the longest step, `step` or more.
        limit: the most intervals a ray has; None = any number.

    Returns:
        ``offsets`` int32 ``[n_rays + 1]``, exclusive prefix sum of the intervals per ray; ``t_starts``, ``t_ends``
        ``[n]``, ``ray_indices`` int32 ``[n]``, in the order of the rays and along each; ``ends [n_rays]``, where a ray
        goes on: the end of its last interval where `limit` stopped it, else t_far. As the next call's t_near that
        makes it begin behind the last interval, and a finished ray have none. No gradient flows through them.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
        RuntimeError: more than 2^31 - 1 intervals, or the native core for this device was not built.
    """
    _check("traverse", origins, directions, t_near, t_far, boxes, occupied, step, cone_angle, max_step, limit)
    rays = (origins.detach(), directions.detach(), t_near.detach(), t_far.detach(), boxes.detach())
    return _traverse(*rays, occupied, step, cone_angle, max_step, limit)


def only_rays(t_far: Tensor, rays_mask: Tensor) -> Tensor:
    """The `t_far` with which `traverse` leaves out the rays whose mask is False: -inf for these.

    Args:
        t_far: ``[n_rays]``.
        rays_mask: bool ``[n_rays]``.
    """
    return torch.where(rays_mask, t_far, -math.inf)


def _check(
    op: str,
    origins: Tensor,
    directions: Tensor,
    t_near: Tensor,
    t_far: Tensor,
    boxes: Tensor,
    occupied: Tensor,
    step: float,
    cone_angle: float,
    max_step: float,
    limit: int | None,
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
    check_tensor(op, "boxes", boxes, ["L", 6], like=origins, same_dtype=True)
    check_tensor(op, "occupied", occupied, ["L", "X", "Y", "Z"], (torch.bool,), like=origins)
    check_same_length(op, "occupied", occupied, "boxes", boxes)
    if not 0 < occupied.numel() < 2**31:
        raise ValueError(f"{op}: occupied must have 1 to 2^31 - 1 cells, got {list(occupied.shape)}")
    most = torch.finfo(origins.dtype).max
    wanted = "0 or less, or positive and finite"
    check_number(op, "step", step, wanted, lambda number: -most <= number <= 0 or positive_in(origins.dtype)(number))
    check_number(op, "cone_angle", cone_angle, "0 or more, and finite", lambda number: 0 <= number <= most)
    check_number(op, "max_step", max_step, "step or more", lambda number: number >= step)
    if limit is not None:
        wanted = "between 1 and 2^31 - 1, or None"
        check_number(op, "limit", limit, wanted, lambda number: 1 <= number <= MAX_SAMPLES, whole=True)


def _levels(boxes: Tensor, occupied: Tensor) -> Tensor:
    """The low corner, the cells per unit of length and the size of a cell of each level, ``[L, 3, 3]``.

    Here for both the op and its twin, which have to agree in every bit.
    """
    low, extent = boxes[:, :3], boxes[:, 3:] - boxes[:, :3]
    cells = torch.tensor(occupied.shape[1:], dtype=boxes.dtype, device="cpu").to(boxes.device)
    return torch.stack([low, torch.where(extent > 0, cells / extent, math.nan), extent / cells], dim=1).contiguous()


@torch.library.custom_op("dreamfusion_fast::traverse", mutates_args=())
def _traverse(
    origins: Tensor,
    directions: Tensor,
    t_near: Tensor,
    t_far: Tensor,
    boxes: Tensor,
    occupied: Tensor,
    step: float,
    cone_angle: float,
    max_step: float,
    limit: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = tuple(tensor.contiguous() for tensor in (origins, directions, t_near, t_far))
    levels, occupied = _levels(boxes, occupied), occupied.contiguous()
    n_rays, n_levels, cells = origins.shape[0], occupied.shape[0], tuple(occupied.shape[1:])
    blocks = occupied.new_empty((n_levels, *(-(-size // 8) for size in cells)))
    call("traverse_blocks", occupied, pointer(occupied), cells, n_levels, pointer(blocks))
    grid = (pointer(levels), pointer(occupied), pointer(blocks), cells, n_levels)
    numbers = (step, cone_angle, max_step, MAX_SAMPLES if limit is None else limit)
    rays = (*(pointer(tensor) for tensor in tensors), *grid, *numbers, n_rays)
    counts, firsts, ends = (
        origins.new_empty(n_rays, dtype=torch.int32),
        t_near.new_empty(n_rays),
        t_far.new_empty(n_rays),
    )
    if n_rays > 0:
        call("traverse_count", origins, rays, pointer(counts), pointer(firsts), pointer(ends))
    totals = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int64), (1, 0))
    size = int(totals[-1])  # the one wait for the GPU
    if size > MAX_SAMPLES:
        raise RuntimeError(f"traverse: {size} intervals, more than 2^31 - 1: traverse with fewer rays at once")
    offsets = totals.to(torch.int32)
    t_starts, t_ends, ray_indices = origins.new_empty(size), origins.new_empty(size), counts.new_empty(size)
    if size > 0:
        outputs = (pointer(t_starts), pointer(t_ends), pointer(ray_indices))
        call("traverse_write", origins, rays, pointer(firsts), pointer(offsets), *outputs)
    return offsets, t_starts, t_ends, ray_indices, ends


@_traverse.register_fake
def _(
    origins: Tensor,
    directions: Tensor,
    t_near: Tensor,
    t_far: Tensor,
    boxes: Tensor,
    occupied: Tensor,
    step: float,
    cone_angle: float,
    max_step: float,
    limit: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_rays, size = origins.shape[0], torch.library.get_ctx().new_dynamic_size()
    offsets = origins.new_empty(n_rays + 1, dtype=torch.int32)
    t_starts, t_ends = origins.new_empty(size), origins.new_empty(size)
    return offsets, t_starts, t_ends, offsets.new_empty(size), origins.new_empty(n_rays)


def traverse_reference(
    origins: Tensor,
    directions: Tensor,
    t_near: Tensor,
    t_far: Tensor,
    boxes: Tensor,
    occupied: Tensor,
    step: float,
    cone_angle: float = 0.0,
    max_step: float = math.inf,
    limit: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The PyTorch twin of `traverse`: visits every step of every ray. Float32 or float64, any device.

    Every operation is done alone and in the order of the native core, because the results have to agree in every bit.
    """
    arguments = (origins, directions, t_near, t_far, boxes, occupied, step, cone_angle, max_step, limit)
    _check("traverse_reference", *arguments)
    origins, directions, t_near, t_far = (x.detach() for x in (origins, directions, t_near, t_far))
    levels = _levels(boxes.detach(), occupied)
    finite = origins.isfinite().all(dim=1) & directions.isfinite().all(dim=1)
    valid = finite & t_near.isfinite() & (directions != 0).any(dim=1)
    if not step > 0:
        starts, ends = _pieces(origins, directions, t_near, t_far, levels, occupied)
        middles = starts + (ends - starts) * 0.5
    else:
        starts, middles, ends = _steps(origins, directions, t_near, t_far, boxes.detach(), step, cone_angle, max_step)
    cells = _cells(origins, directions, middles, levels, occupied)
    kept = valid[:, None] & (cells >= 0) & occupied.reshape(-1)[cells.clamp(min=0)]
    if step > 0:
        kept = kept & (middles < t_far[:, None]) & (ends > starts if cone_angle > 0 else True)
    else:
        starts, ends, kept = _merged(starts, ends, kept, cells)
    most = MAX_SAMPLES if limit is None else limit
    number = kept.cumsum(dim=1)
    stopped = kept & (number == most)
    goes_on = torch.where(stopped.any(dim=1), torch.where(stopped, ends, 0.0).sum(dim=1), t_far)
    kept = kept & (number <= most)
    offsets = torch.nn.functional.pad(kept.sum(dim=1).cumsum(0), (1, 0)).to(torch.int32)
    rays = torch.arange(origins.shape[0], dtype=torch.int32, device=origins.device)[:, None].expand_as(kept)
    return offsets, starts[kept], ends[kept], rays[kept], goes_on


def _steps(
    origins: Tensor,
    directions: Tensor,
    t_near: Tensor,
    t_far: Tensor,
    boxes: Tensor,
    step: float,
    cone_angle: float,
    max_step: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Start, middle and end of every step, ``[n_rays, n_steps]``, until the rays are behind t_far or all boxes."""
    low, high = boxes[:, :3].amin(dim=0), boxes[:, 3:].amax(dim=0)
    margin = 1e-3 * (high - low).clamp(min=0)
    _, leave = ray_box_reference(origins, directions, torch.cat([low - margin, high + margin]), near=-math.inf)
    until = torch.where(t_near.isfinite() & leave.isfinite(), torch.minimum(t_far, leave), -math.inf)
    least, most, angle = (origins.new_full((), float(number)) for number in (step, max_step, cone_angle))
    if cone_angle > 0:
        edges = [t_near]
        lengths: list[Tensor] = []
        while len(lengths) < MAX_STEPS and bool((edges[-1] < until).any()):
            length = torch.minimum(torch.maximum(edges[-1] * angle, least), most)
            following = edges[-1] + length
            if bool((following == edges[-1]).all()):
                break
            lengths.append(length)
            edges.append(following)
        starts = torch.stack(edges[:-1], dim=1) if lengths else t_near.new_zeros(t_near.shape[0], 0)
        half = torch.stack(lengths, dim=1) * 0.5 if lengths else starts
        return starts, starts + half, torch.stack(edges[1:], dim=1) if lengths else starts
    spans = torch.where(until.isfinite(), until - t_near, -1.0)
    n_steps = int((spans / least).ceil().amax().clamp(min=-2, max=MAX_STEPS - 2)) + 2 if t_near.shape[0] > 0 else 0
    k = torch.arange(n_steps, device=origins.device).to(origins.dtype)
    return tuple(t_near[:, None] + (k + part) * least for part in (0, 0.5, 1))  # type: ignore[return-value]


def _pieces(
    origins: Tensor, directions: Tensor, t_near: Tensor, t_far: Tensor, levels: Tensor, occupied: Tensor
) -> tuple[Tensor, Tensor]:
    """Start and end of what the walls of all levels cut a ray into, ``[n_rays, n_pieces]``; some are empty."""
    cuts = [t_near[:, None], t_far[:, None]]
    for low, scale, size in levels:
        enter, leave = torch.full_like(t_near, -math.inf), torch.full_like(t_near, math.inf)
        hit, walls = torch.ones_like(t_near, dtype=torch.bool), []
        for axis, count in enumerate(occupied.shape[1:]):
            parallel = directions[:, axis] == 0
            own = (origins[:, axis] - low[axis]) * scale[axis]
            hit = hit & (~parallel | ((own >= 0) & (own < count)))
            wall = torch.arange(count + 1, device=origins.device).to(origins.dtype)
            times = ((low[axis] + wall * size[axis])[None] - origins[:, axis, None]) / directions[:, axis, None]
            first, last = torch.minimum(times[:, 0], times[:, -1]), torch.maximum(times[:, 0], times[:, -1])
            enter = torch.where(parallel | ~(first > enter), enter, first)
            leave = torch.where(parallel | ~(last < leave), leave, last)
            walls.append(torch.where(parallel[:, None], math.nan, times))
        times = torch.cat(walls, dim=1)
        crossed = (hit & (enter < leave))[:, None] & (times >= enter[:, None]) & (times <= leave[:, None])
        cuts.append(torch.where(crossed, times, math.nan))
    times = torch.cat(cuts, dim=1)
    within = (times >= t_near[:, None]) & (times <= t_far[:, None])
    edges = torch.where(within, times, t_far[:, None]).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    edges = edges.sort(dim=1).values
    return edges[:, :-1], edges[:, 1:]


def _merged(starts: Tensor, ends: Tensor, kept: Tensor, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pieces of one cell, one behind the other, as one, in the place of the first."""
    n_pieces = starts.shape[1]
    kept = kept & (ends > starts)
    whole = ends > starts  # empty pieces lie between others without keeping them apart
    place = torch.arange(n_pieces, device=starts.device).expand_as(whole)
    before = torch.where(whole, place, -1).cummax(dim=1).values
    before = torch.nn.functional.pad(before, (1, -1), value=-1)  # the last whole piece before each
    same = (before >= 0) & kept & kept.gather(1, before.clamp(min=0))
    same = same & (cells == cells.gather(1, before.clamp(min=0)))
    opens = kept & ~same
    run = torch.where(kept, opens.cumsum(dim=1) - 1, n_pieces)
    last = torch.full((starts.shape[0], n_pieces + 1), -math.inf, dtype=ends.dtype, device=ends.device)
    last = last.scatter_reduce(1, run, ends, "amax")
    return starts, last.gather(1, run.clamp(min=0)), opens


def _cells(origins: Tensor, directions: Tensor, t: Tensor, levels: Tensor, occupied: Tensor) -> Tensor:
    """The flat index into `occupied` of the cell at distances t ``[n_rays, n]``; -1 outside of all levels."""
    found = torch.full_like(t, -1, dtype=torch.int64)
    sizes = torch.tensor(occupied.shape[1:], device=origins.device)
    for level in range(levels.shape[0] - 1, -1, -1):  # the first one that holds it decides
        low, scale, _ = levels[level]
        own = (origins[:, None] + t[..., None] * directions[:, None] - low) * scale
        inside = ((own >= 0) & (own < sizes)).all(dim=-1)
        x, y, z = torch.where(inside[..., None], own, 0.0).long().unbind(dim=-1)
        index = ((level * occupied.shape[1] + x) * occupied.shape[2] + y) * occupied.shape[3] + z
        found = torch.where(inside, index, found)
    return found
