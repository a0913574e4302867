"""Sampling intervals along rays by a distribution over others (inverse transform sampling; mip-NeRF 360)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dreamfusion_fast.integrations.nerfacc import _lazy
from dreamfusion_fast.integrations.nerfacc.data_specs import RayIntervals, RaySamples


def searchsorted(
    sorted_sequence: RayIntervals | RaySamples, values: RayIntervals | RaySamples
) -> tuple[Tensor, Tensor]:
    """Between which of a ray's sorted numbers each value lies.

    ``sorted[left] <= value < sorted[right]`` with right = left + 1. A value below all of them is taken as in the first
    gap, and one that is the last or above as in the last gap.

    Args:
        sorted_sequence: numbers that rise along each ray, batched `[n_rays, n]` or flattened with `packed_info`.
        values: what is looked up, `[n_rays, k]` or flattened with `packed_info`, for as many rays.

    Returns:
        left, right: int64 like ``values.vals``. Batched, they count within a row; flattened, from the first number of
        all rays. With flattened numbers a GPU is waited for.

    Raises:
        ValueError: one is batched and the other is not, or flattened without `packed_info`.
    """
    keys, queries = sorted_sequence.vals, values.vals
    if keys.dim() > 1 and queries.dim() > 1:
        right = torch.searchsorted(keys.contiguous(), queries.contiguous(), right=True)
        right = right.clamp(min=1).clamp(max=keys.shape[-1] - 1)
        return (right - 1).clamp(min=0), right
    if sorted_sequence.packed_info is None or values.packed_info is None or keys.dim() != 1 or queries.dim() != 1:
        raise ValueError(
            "searchsorted: sorted_sequence and values must both be batched, or both flattened with packed_info, got "
            f"shapes {list(keys.shape)} and {list(queries.shape)}"
        )
    counts = values.packed_info[:, 1]
    first, last = _ends_of_rays(sorted_sequence.packed_info, counts, queries.shape[0])
    right = torch.minimum(torch.maximum(_bisect(keys, queries, first, last + 1), first + 1), last)
    return torch.maximum(right - 1, first), right


@torch.no_grad()
def importance_sampling(
    intervals: RayIntervals, cdfs: Tensor, n_intervals_per_ray: Tensor | int, stratified: bool = False
) -> tuple[RayIntervals, RaySamples]:
    """New intervals along rays, each with the same share of a distribution.

    A ray's range of the distribution, from the value at its first edge to that at its last, is cut into n equal parts.
    The samples are the places where the distribution has the value in a part's middle, or, stratified, at one random
    place for all parts of a ray. Halfway between samples are the edges; the outer ones are as far from the outer
    samples as their neighbours are, and not outside the ray's first and last edge. One interval spans the whole ray.

    Args:
        intervals: edges `[n_rays, k]`, or flattened with `packed_info`, rising along each ray.
        cdfs: like ``intervals.vals``, the distribution at the edges, not falling along a ray.
        n_intervals_per_ray: n, an int, or int64 `[n_rays]`.
        stratified: random places, by torch's generator.

    Returns:
        intervals and samples: edges `[n_rays, n + 1]` and samples `[n_rays, n]`, or, with a tensor n, flattened with
        all attributes. Rays without edges get zeros. No gradients.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape.
    """
    op = "importance_sampling"
    vals = intervals.vals
    if not isinstance(cdfs, Tensor) or cdfs.shape != vals.shape:
        got = list(cdfs.shape) if isinstance(cdfs, Tensor) else _lazy.shown(cdfs)
        raise ValueError(f"{op}: cdfs must have the shape of the intervals' edges, {list(vals.shape)}, got {got}")
    if isinstance(n_intervals_per_ray, Tensor):
        edges, values, packed_info = _flattened(op, intervals, cdfs)
        wanted_shape = [packed_info.shape[0]]
        _lazy.check_tensor(op, "n_intervals_per_ray", n_intervals_per_ray, wanted_shape, (torch.int64, torch.int32))
        counts = n_intervals_per_ray.long()
        return _resampled(edges, values, packed_info, counts, int(counts.sum()), stratified)
    n = n_intervals_per_ray
    _lazy.check_number(op, "n_intervals_per_ray", n, "at least 1", lambda number: number >= 1, whole=True)
    if vals.dim() > 1:
        if vals.shape[-1] == 0:
            raise ValueError(f"{op}: intervals must have edges, got shape {list(vals.shape)}")
        new, middles = _resampled_rows(vals, cdfs, n, stratified, vals[..., :1], vals[..., -1:])
        return RayIntervals(new), RaySamples(middles)
    edges, values, packed_info = _flattened(op, intervals, cdfs)
    n_rays = packed_info.shape[0]
    counts = torch.full((n_rays,), n, device=vals.device)
    packed, flat = _resampled(edges, values, packed_info, counts, n_rays * n, stratified)
    return RayIntervals(packed.vals.view(n_rays, n + 1)), RaySamples(flat.vals.view(n_rays, n))


def _resampled_rows(
    edges: Tensor, cdfs: Tensor, n: int, stratified: bool, vmin: float | Tensor, vmax: float | Tensor
) -> tuple[Tensor, Tensor]:
    """`importance_sampling` of batched rays; the outer edges are not outside of `vmin` and `vmax`."""
    shape = (*edges.shape[:-1], 1)
    shift = torch.rand(shape, dtype=cdfs.dtype, device=edges.device) if stratified else 0.5
    share = (torch.arange(n, dtype=cdfs.dtype, device=edges.device) + shift) / n
    wanted = torch.lerp(cdfs[..., :1], cdfs[..., -1:], share.expand(*edges.shape[:-1], n))
    right = torch.searchsorted(cdfs.contiguous(), wanted.contiguous(), right=True).clamp(max=edges.shape[-1] - 1)
    left = (right - 1).clamp(min=0)
    middles = _between(wanted, *(x.gather(-1, i) for x in (cdfs, edges) for i in (left, right)))
    inner = 0.5 * (middles[..., 1:] + middles[..., :-1])
    if n == 1:
        low, high = edges[..., :1], edges[..., -1:]
    else:
        low = (2 * middles[..., :1] - inner[..., :1]).clamp(min=vmin)
        high = (2 * middles[..., -1:] - inner[..., -1:]).clamp(max=vmax)
    return torch.cat([low, inner, high], dim=-1), middles


def _between(wanted: Tensor, cdf_left: Tensor, cdf_right: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Where a distribution that is linear between two edges has the wanted value; the left edge where it is flat."""
    rise = cdf_right - cdf_left
    along = torch.where(rise > 0, (wanted - cdf_left) / torch.where(rise > 0, rise, 1.0), 0.0)
    return torch.lerp(left, right, along.clamp(0, 1).to(left.dtype))


def _flattened(op: str, intervals: RayIntervals, cdfs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Edges and distribution of all rays one behind the other, and the packed info of the edges."""
    vals = intervals.vals
    if vals.dim() > 1:
        each = vals.shape[-1]
        if each == 0:
            raise ValueError(f"{op}: intervals must have edges, got shape {list(vals.shape)}")
        starts = torch.arange(vals.numel() // each, device=vals.device) * each
        return vals.reshape(-1), cdfs.reshape(-1), torch.stack([starts, torch.full_like(starts, each)], dim=1)
    if intervals.packed_info is None:
        raise ValueError(f"{op}: flattened intervals must have packed_info")
    return vals, cdfs, intervals.packed_info.long()


def _resampled(
    edges: Tensor, cdfs: Tensor, packed_info: Tensor, counts: Tensor, total: int, stratified: bool
) -> tuple[RayIntervals, RaySamples]:
    """`importance_sampling` of flattened rays."""
    n_rays = packed_info.shape[0]
    shift = torch.rand(n_rays, dtype=edges.dtype, device=edges.device) if stratified else edges.new_full((n_rays,), 0.5)
    each = torch.arange(n_rays, device=edges.device)
    rays = torch.repeat_interleave(each, counts, output_size=total)
    starts = counts.cumsum(0) - counts
    number = torch.arange(total, device=edges.device) - starts[rays]

    first, last = _ends_of_rays(packed_info, counts, total)
    some = (last >= first) if edges.numel() > 0 else torch.zeros_like(first, dtype=torch.bool)
    if edges.numel() == 0:
        edges, cdfs = edges.new_zeros(1), cdfs.new_zeros(1)
        first, last = torch.zeros_like(first), torch.zeros_like(last)
    last = torch.maximum(last, first).clamp(max=edges.shape[0] - 1)
    first = torch.minimum(first, last)
    share = (number + shift[rays]) / counts[rays]
    wanted = torch.lerp(cdfs[first], cdfs[last], share)
    right = torch.minimum(_bisect(cdfs, wanted, first, last + 1), last)
    left = torch.maximum(right - 1, first)
    middles = _between(wanted, cdfs[left], cdfs[right], edges[left], edges[right])
    middles = torch.where(some, middles, 0.0)

    # Edge i of a ray is halfway between samples i - 1 and i; sample i is between edges i and i + 1.
    edge_counts = torch.where(counts > 0, counts + 1, 0)
    edge_starts = edge_counts.cumsum(0) - edge_counts
    n_edges = total + int((counts > 0).sum())
    low = edge_starts[rays] + number
    begins, ends = number == 0, number == counts[rays] - 1
    before = torch.cat([middles[:1], middles[:-1]])
    lower = 0.5 * (before + middles)
    after = torch.cat([lower[1:], lower[:1]])  # upper edge of each sample but a ray's last
    ray_low, ray_high = torch.where(some, edges[first], 0.0), torch.where(some, edges[last], 0.0)
    alone = begins & ends
    outer_low = torch.where(alone, ray_low, torch.maximum(2 * middles - after, ray_low))
    outer_high = torch.where(alone, ray_high, torch.minimum(2 * middles - lower, ray_high))
    new = edges.new_zeros(n_edges).index_copy(0, low, torch.where(begins, outer_low, lower))
    new = new.index_copy(0, low[ends] + 1, outer_high[ends])
    is_left = torch.zeros(n_edges, dtype=torch.bool, device=edges.device).index_fill(0, low, True)
    is_right = torch.zeros_like(is_left).index_fill(0, low + 1, True)
    intervals = RayIntervals(
        vals=new,
        packed_info=torch.stack([edge_starts, edge_counts], dim=1),
        ray_indices=torch.repeat_interleave(each, edge_counts, output_size=n_edges),
        is_left=is_left,
        is_right=is_right,
    )
    return intervals, RaySamples(middles, torch.stack([starts, counts], dim=1), rays)


def _ends_of_rays(packed_info: Tensor, counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """First and last element of a ray, repeated for so many items of each ray."""
    first, number = packed_info.long().unbind(dim=1)
    repeated = [torch.repeat_interleave(x, counts, output_size=total) for x in (first, first + number - 1)]
    return repeated[0], repeated[1]


def _bisect(keys: Tensor, queries: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """First index in ``[low, high)`` of each query whose key is above it, or `high`."""
    longest = int((high - low).max()) if queries.numel() > 0 else 0
    for _ in range(math.ceil(math.log2(longest + 1)) if longest > 0 else 0):
        middle = (low + high) // 2
        searching = low < high
        above = keys[middle.clamp(max=keys.shape[0] - 1)] > queries
        high = torch.where(searching & above, middle, high)
        low = torch.where(searching & ~above, middle + 1, low)
    return low


def _sample_from_weighted(
    bins: Tensor,
    weights: Tensor,
    num_samples: int,
    stratified: bool = False,
    vmin: float | Tensor = -math.inf,
    vmax: float | Tensor = math.inf,
) -> tuple[Tensor, Tensor]:
    """`importance_sampling` by weights, of batched rays.

    Args:
        bins: edges `[..., n + 1]`.
        weights: `[..., n]`, not negative.
        num_samples: at least 1.
        stratified: random places, one per ray.
        vmin, vmax: the outer edges are not outside of them.

    Returns:
        edges `[..., num_samples + 1]` and samples `[..., num_samples]`.
    """
    if bins.shape[:-1] != weights.shape[:-1] or bins.shape[-1] != weights.shape[-1] + 1:
        raise ValueError(
            "_sample_from_weighted: bins must have one element more than weights along the last axis, got shapes "
            f"{list(bins.shape)} and {list(weights.shape)}"
        )
    cdfs = torch.nn.functional.pad(weights.cumsum(dim=-1), (1, 0))
    return _resampled_rows(bins, cdfs, num_samples, stratified, vmin, vmax)
