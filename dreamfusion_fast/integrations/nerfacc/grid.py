"""Rays and boxes, and the traversal of occupancy grids."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dreamfusion_fast.integrations.nerfacc import _lazy
from dreamfusion_fast.integrations.nerfacc.data_specs import RayIntervals, RaySamples


def _ray_aabb_intersect(
    rays_o: Tensor,
    rays_d: Tensor,
    aabbs: Tensor,
    near_plane: float = -math.inf,
    far_plane: float = math.inf,
    miss_value: float = math.inf,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ray_aabb_intersect` with gradients to rays and boxes."""
    op = "ray_aabb_intersect"
    _lazy.check_tensor(op, "rays_o", rays_o, ["n_rays", 3])
    _lazy.check_tensor(op, "rays_d", rays_d, [rays_o.shape[0], 3], like=rays_o, same_dtype=True)
    _lazy.check_tensor(op, "aabbs", aabbs, ["m", 6], like=rays_o, same_dtype=True)
    origins, directions = rays_o[:, None], rays_d[:, None]
    low, high = aabbs[:, :3], aabbs[:, 3:]
    # Parallel to a slab a ray is inside for ever or never. The divisor 1 keeps 0 / 0 out.
    parallel = directions == 0
    divisor = torch.where(parallel, 1.0, directions)
    to_low, to_high = (low - origins) / divisor, (high - origins) / divisor
    never = parallel & ((origins < low) | (origins > high))
    enter = torch.where(parallel, -math.inf, torch.minimum(to_low, to_high)).amax(dim=-1)
    leave = torch.where(parallel, math.inf, torch.maximum(to_low, to_high)).amin(dim=-1)
    hits = (enter < leave) & (leave > 0) & ~never.any(dim=-1)
    enter, leave = (torch.where(hits, t.clamp(near_plane, far_plane), miss_value) for t in (enter, leave))
    return enter, leave, hits


@torch.no_grad()
def ray_aabb_intersect(
    rays_o: Tensor,
    rays_d: Tensor,
    aabbs: Tensor,
    near_plane: float = -math.inf,
    far_plane: float = math.inf,
    miss_value: float = math.inf,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where each ray enters and leaves each box (slab method, Kay and Kajiya 1986).

    Args:
        rays_o, rays_d: `[n_rays, 3]`; distances are in units of a direction's length.
        aabbs: `[m, 6]`, (xmin, ymin, zmin, xmax, ymax, zmax).
        near_plane, far_plane: what distances are clamped to.
        miss_value: both distances where a ray misses a box, or has it behind.

    Returns:
        t_mins, t_maxs and, bool, hits, each `[n_rays, m]`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
    """
    return _ray_aabb_intersect(rays_o, rays_d, aabbs, near_plane, far_plane, miss_value)


@torch.no_grad()
def traverse_grids(
    rays_o: Tensor,
    rays_d: Tensor,
    binaries: Tensor,
    aabbs: Tensor,
    near_planes: Tensor | None = None,
    far_planes: Tensor | None = None,
    step_size: float | None = 1e-3,
    cone_angle: float | None = 0.0,
    traverse_steps_limit: int | None = None,
    over_allocate: bool | None = False,
    rays_mask: Tensor | None = None,
    t_sorted: Tensor | None = None,
    t_indices: Tensor | None = None,
    hits: Tensor | None = None,
) -> tuple[RayIntervals, RaySamples, Tensor]:
    """Intervals of rays whose middles lie in occupied cells. Of several boxes the first that holds a place counts.

    Args:
        rays_o, rays_d: `[n_rays, 3]`; distances are in units of a direction's length.
        binaries: bool `[m, X, Y, Z]`, which cells are occupied.
        aabbs: `[m, 6]`, the box of each grid, from the finest; they need not be nested.
        near_planes, far_planes: `[n_rays]`, where a ray's first interval begins and none goes on; 0 and infinity if
            None.
        step_size: length of an interval in units of distance; 0 or below: one interval for each crossed cell.
        cone_angle: length per distance where that is longer than the step.
        traverse_steps_limit: most intervals of a ray; None or not above 0 = any number.
        over_allocate: give each ray room for `traverse_steps_limit` intervals, used or not.
        rays_mask: bool `[n_rays]`, False for rays to leave out.
        t_sorted, t_indices, hits: intersections with the boxes. They are computed here in any case.

    Returns:
        The intervals, flattened; the samples in their middles; and `[n_rays]`, the distance at which each ray ended, to
        go on from. No gradients.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    op = "traverse_grids"
    _lazy.check_tensor(op, "rays_o", rays_o, ["n_rays", 3])
    n_rays = rays_o.shape[0]
    limit = traverse_steps_limit if traverse_steps_limit is not None and traverse_steps_limit > 0 else None
    if over_allocate and limit is None:
        raise ValueError(f"{op}: traverse_steps_limit must be above 0 with over_allocate, got {traverse_steps_limit}")
    near = rays_o.new_zeros(n_rays) if near_planes is None else near_planes
    far = rays_o.new_full((n_rays,), math.inf) if far_planes is None else far_planes
    if rays_mask is not None:
        _lazy.check_tensor(op, "rays_mask", rays_mask, [n_rays], (torch.bool,), like=rays_o)
        far = torch.where(rays_mask, far, -math.inf)
    offsets, t_starts, t_ends, rays, ends = _lazy.traverse(
        rays_o, rays_d, near, far, aabbs, binaries, step_size or 0.0, cone_angle or 0.0, limit=limit
    )
    if rays_mask is not None:
        ends = torch.where(rays_mask, ends, near)
    room = limit if over_allocate else None
    return *_with_edges(offsets, t_starts, t_ends, rays.long(), room), ends


def _with_edges(
    offsets: Tensor, t_starts: Tensor, t_ends: Tensor, rays: Tensor, room: int | None
) -> tuple[RayIntervals, RaySamples]:
    """Intervals and samples of rays that have them one behind the other, or room for so many each."""
    n_rays, n_samples = offsets.shape[0] - 1, t_starts.shape[0]
    starts = offsets[:-1].long()
    number = torch.arange(n_samples, device=offsets.device)
    # An interval that begins where the one before it ends has that edge in common with it.
    first = torch.ones(n_samples, dtype=torch.bool, device=offsets.device)
    first[1:] = (t_starts[1:] != t_ends[:-1]) | (rays[1:] != rays[:-1])
    edges_before = torch.nn.functional.pad((number + 1 + first.cumsum(0)), (1, 0))  # of each sample, and of all
    edge_offsets = edges_before[offsets.long()]
    right = edges_before[1:] - 1
    if room is None:
        sample, n_slots, n_edges = number, n_samples, n_samples + int(first.sum()) if n_samples > 0 else 0
        sample_starts, edge_starts = starts, edge_offsets[:-1]
    else:
        n_slots, n_edges = n_rays * room, 2 * n_rays * room
        each = torch.arange(n_rays, device=offsets.device)
        sample_starts, edge_starts = each * room, each * 2 * room
        sample = sample_starts[rays] + number - starts[rays]
        right = edge_starts[rays] + right - edge_offsets[rays]
    left = right - 1

    slots = t_starts.new_zeros(n_slots)
    samples = RaySamples(
        vals=slots.index_copy(0, sample, 0.5 * (t_starts + t_ends)),
        packed_info=torch.stack([sample_starts, offsets.diff().long()], dim=1),
        ray_indices=rays.new_zeros(n_slots).index_copy(0, sample, rays),
        is_valid=torch.zeros(n_slots, dtype=torch.bool, device=offsets.device).index_fill(0, sample, True),
    )
    edges = t_starts.new_zeros(n_edges).index_copy(0, right, t_ends).index_copy(0, left, t_starts)
    none = torch.zeros(n_edges, dtype=torch.bool, device=offsets.device)
    intervals = RayIntervals(
        vals=edges,
        packed_info=torch.stack([edge_starts, edge_offsets.diff()], dim=1),
        ray_indices=rays.new_zeros(n_edges).index_copy(0, right, rays).index_copy(0, left, rays),
        is_left=none.index_fill(0, left, True),
        is_right=none.index_fill(0, right, True),
    )
    return intervals, samples


def _enlarge_aabb(aabb: Tensor, factor: float) -> Tensor:
    """The box `[6]` grown about its centre."""
    low, high = aabb[:3], aabb[3:]
    centre, half = 0.5 * (low + high), 0.5 * (high - low) * factor
    return torch.cat([centre - half, centre + half])


def _query(x: Tensor, data: Tensor, base_aabb: Tensor) -> tuple[Tensor, Tensor]:
    """Values of the cells that hold positions, in the first of several grids, each twice as wide as the one before.

    Args:
        x: `[n, 3]` positions.
        data: `[m, X, Y, Z]` values.
        base_aabb: `[6]`, box of the first grid.

    Returns:
        values `[n]`, 0 outside the last box, and bool `[n]`, whether a position is inside it.
    """
    levels, sizes = data.shape[0], torch.tensor(data.shape[1:], device=x.device)
    centre, half = 0.5 * (base_aabb[:3] + base_aabb[3:]), 0.5 * (base_aabb[3:] - base_aabb[:3])
    scaled = (x - centre) / half  # within [-1, 1]^3 in the first box
    factors = 2.0 ** torch.arange(levels, device=x.device, dtype=x.dtype)
    level = (scaled.abs().amax(dim=-1, keepdim=True) > factors).sum(dim=-1)
    inside = level < levels
    level = level.clamp(max=levels - 1)
    cells = (0.5 * (scaled / factors[level, None] + 1.0) * sizes).long()
    i, j, k = cells.clamp(min=torch.zeros_like(sizes), max=sizes - 1).unbind(dim=-1)
    return data[level, i, j, k] * inside, inside
