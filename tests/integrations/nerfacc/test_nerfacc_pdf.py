"""Importance sampling and searches by nerfacc's names, against float64 loops; mip-NeRF 360's losses."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.integrations import nerfacc
from dreamfusion_fast.integrations.nerfacc.estimators.prop_net import _lossfun_outer, _pdf_loss
from dreamfusion_fast.integrations.nerfacc.pdf import _sample_from_weighted


def resampled(edges: list[float], cdf: list[float], n: int, shift: float) -> tuple[list[float], list[float]]:
    """Edges and samples of one ray, by the words of `importance_sampling`."""
    samples = []
    for i in range(n):
        wanted = cdf[0] + (cdf[-1] - cdf[0]) * (i + shift) / n
        right = min(bisect.bisect_right(cdf, wanted), len(cdf) - 1)
        left = max(right - 1, 0)
        rise = cdf[right] - cdf[left]
        along = min(max((wanted - cdf[left]) / rise, 0.0), 1.0) if rise > 0 else 0.0
        samples.append(edges[left] + along * (edges[right] - edges[left]))
    if n == 1:
        return [edges[0], edges[-1]], samples
    inner = [0.5 * (a + b) for a, b in itertools.pairwise(samples)]
    low, high = max(2 * samples[0] - inner[0], edges[0]), min(2 * samples[-1] - inner[-1], edges[-1])
    return [low, *inner, high], samples


def rising(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64).sort(dim=-1).values


def packed_info(counts: list[int], device: torch.device) -> Tensor:
    number = torch.tensor(counts, dtype=torch.int64)
    return torch.stack([number.cumsum(0) - number, number], dim=1).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 3, 40])
@pytest.mark.parametrize("edges", [2, 3, 114])
def test_batched_importance_sampling(edges: int, n: int, dtype: torch.dtype, device: torch.device) -> None:
    vals, cdfs = rising(5, edges), rising(5, edges)
    cdfs[0, : edges // 2] = 0.0  # a flat part
    cdfs[1] = 0.5  # nothing but one
    intervals, samples = nerfacc.importance_sampling(
        nerfacc.RayIntervals(vals.to(device, dtype)), cdfs.to(device, dtype), n
    )
    tolerance = {torch.float32: 2e-4, torch.float64: 1e-12}[dtype]  # a steep part shows a rounding of its wanted value
    for ray in range(5):
        expected_edges, expected = resampled(vals[ray].tolist(), cdfs[ray].tolist(), n, 0.5)
        assert intervals.vals[ray].tolist() == pytest.approx(expected_edges, abs=tolerance)
        assert samples.vals[ray].tolist() == pytest.approx(expected, abs=tolerance)
    assert (intervals.vals.diff(dim=-1) >= 0).all()
    assert intervals.packed_info is None
    assert intervals.is_left is None


@pytest.mark.parametrize("each", [[3], [2, 0, 1, 7], [0, 0, 5, 1]])
def test_flattened_importance_sampling(each: list[int], device: torch.device) -> None:
    counts = [4, 3, 2, 9][: len(each)]
    rays = [(rising(count), rising(count)) for count in counts]
    given = nerfacc.RayIntervals(torch.cat([vals for vals, _ in rays]).to(device), packed_info(counts, device))
    cdfs = torch.cat([cdf for _, cdf in rays]).to(device)
    intervals, samples = nerfacc.importance_sampling(given, cdfs, torch.tensor(each, device=device))
    expected = [resampled(*(x.tolist() for x in ray), n, 0.5) for ray, n in zip(rays, each, strict=True) if n > 0]
    assert intervals.vals.tolist() == pytest.approx([t for edges, _ in expected for t in edges], abs=1e-12)
    assert samples.vals.tolist() == pytest.approx([t for _, middles in expected for t in middles], abs=1e-12)
    assert samples.packed_info is not None
    assert samples.packed_info.tolist() == packed_info(each, torch.device("cpu")).tolist()
    assert intervals.packed_info is not None
    assert intervals.packed_info[:, 1].tolist() == [n + 1 if n else 0 for n in each]
    assert samples.ray_indices is not None
    assert samples.ray_indices.tolist() == [ray for ray, n in enumerate(each) for _ in range(n)]
    assert intervals.is_left is not None
    assert intervals.is_right is not None
    assert intervals.is_left.tolist() == [i < n for n in each if n for i in range(n + 1)]
    assert intervals.is_right.tolist() == [i > 0 for n in each if n for i in range(n + 1)]

    same, _ = nerfacc.importance_sampling(given, cdfs, 6)
    one_each, _ = nerfacc.importance_sampling(given, cdfs, torch.full((len(each),), 6, device=device))
    assert same.vals.shape == (len(each), 7)
    assert torch.equal(same.vals.flatten(), one_each.vals)


def test_rays_without_edges_and_no_rays(device: torch.device) -> None:
    given = nerfacc.RayIntervals(torch.tensor([1.0, 2.0], device=device), packed_info([0, 2, 0], device))
    intervals, samples = nerfacc.importance_sampling(given, torch.tensor([0.0, 1.0], device=device), 2)
    assert intervals.vals.tolist() == [[0.0] * 3, [1.0, 1.5, 2.0], [0.0] * 3]
    assert samples.vals.tolist() == [[0.0] * 2, [1.25, 1.75], [0.0] * 2]
    nothing = torch.zeros(0, device=device)
    none, _ = nerfacc.importance_sampling(nerfacc.RayIntervals(nothing, packed_info([0], device)), nothing, 2)
    assert none.vals.tolist() == [[0.0] * 3]
    none, _ = nerfacc.importance_sampling(nerfacc.RayIntervals(nothing.view(0, 3)), nothing.view(0, 3), 2)
    assert none.vals.shape == (0, 3)


def test_the_range_of_the_distribution_is_what_is_cut(device: torch.device) -> None:
    given = nerfacc.RayIntervals(torch.tensor([0.0, 1.0, 0.0, 1.0, 2.0], device=device), packed_info([2, 3], device))
    intervals, samples = nerfacc.importance_sampling(given, torch.tensor([0.0, 0.5, 0.0, 0.5, 1.0], device=device), 2)
    assert intervals.vals.tolist() == [[0.0, 0.5, 1.0], [0.0, 1.0, 2.0]]
    assert samples.vals.tolist() == [[0.25, 0.75], [0.5, 1.5]]


def test_stratified_samples_share_one_shift_per_ray(device: torch.device) -> None:
    edges = torch.tensor([0.0, 1.0], device=device).repeat(2000, 1)
    _, samples = nerfacc.importance_sampling(nerfacc.RayIntervals(edges), edges, 4, stratified=True)
    shift = samples.vals * 4 - torch.arange(4, device=device)
    assert (shift - shift[:, :1]).abs().max() < 1e-5
    assert (shift >= 0).all()
    assert (shift < 1 + 1e-6).all()
    assert shift[:, 0].mean().item() == pytest.approx(0.5, abs=0.03)
    assert shift[:, 0].std().item() == pytest.approx(12**-0.5, abs=0.02)


@pytest.mark.parametrize("stratified", [False, True])
def test_sample_from_weighted_is_importance_sampling(stratified: bool, device: torch.device) -> None:
    bins, weights = rising(3, 8).to(device), torch.rand(3, 7, dtype=torch.float64, device=device)
    torch.manual_seed(5)
    edges, samples = _sample_from_weighted(bins, weights, 11, stratified, bins[:, :1], bins[:, -1:])
    torch.manual_seed(5)
    cdfs = torch.nn.functional.pad(weights.cumsum(-1), (1, 0))
    expected_edges, expected = nerfacc.importance_sampling(nerfacc.RayIntervals(bins), cdfs, 11, stratified)
    torch.testing.assert_close(edges, expected_edges.vals)
    torch.testing.assert_close(samples, expected.vals)
    free, _ = _sample_from_weighted(bins, weights, 11)
    assert (free[:, 0] <= edges[:, 0]).all() if not stratified else free.shape == edges.shape


def test_searchsorted(device: torch.device) -> None:
    keys, queries = rising(5, 9), torch.rand(5, 13, dtype=torch.float64) * 1.4 - 0.2
    queries[:, 0] = keys[:, 3]
    left, right = nerfacc.searchsorted(nerfacc.RayIntervals(keys.to(device)), nerfacc.RaySamples(queries.to(device)))
    expected = torch.tensor(
        [
            [min(max(bisect.bisect_right(row, q), 1), 8) for q in query]
            for row, query in zip(keys.tolist(), queries.tolist(), strict=True)
        ]
    )
    assert torch.equal(right.cpu(), expected)
    assert torch.equal(left.cpu(), expected - 1)
    flat_keys = nerfacc.RayIntervals(keys.flatten().to(device), packed_info([9] * 5, device))
    flat_queries = nerfacc.RayIntervals(queries.flatten().to(device), packed_info([13] * 5, device))
    flat_left, flat_right = nerfacc.searchsorted(flat_keys, flat_queries)
    starts = torch.arange(5)[:, None] * 9
    assert torch.equal(flat_left.cpu().view(5, 13), expected - 1 + starts)
    assert torch.equal(flat_right.cpu().view(5, 13), expected + starts)


def test_flattened_searchsorted_of_unequal_rays(device: torch.device) -> None:
    keys = nerfacc.RayIntervals(torch.tensor([0.0, 1.0, 0.0, 1.0, 2.0], device=device), packed_info([2, 3], device))
    values = nerfacc.RayIntervals(torch.tensor([0.5, 1.5, 2.5], device=device), packed_info([1, 2], device))
    left, right = nerfacc.searchsorted(keys, values)
    assert left.tolist() == [0, 3, 3]
    assert right.tolist() == [1, 4, 4]
    one = nerfacc.RayIntervals(torch.tensor([3.0], device=device), packed_info([1, 0], device))
    left, right = nerfacc.searchsorted(
        one, nerfacc.RayIntervals(torch.tensor([9.0], device=device), packed_info([1, 0], device))
    )
    assert (left.tolist(), right.tolist()) == ([0], [0])


def outer_bound(t: list[float], t_env: list[float], w_env: list[float]) -> list[float]:
    """Weight of all coarse intervals that touch each fine one, where both histograms span the same range."""
    bounds = []
    for a, b in itertools.pairwise(t):
        touching = [w for c, d, w in zip(t_env, t_env[1:], w_env, strict=False) if c <= b and d > a]
        bounds.append(sum(touching))
    return bounds


def test_the_losses_of_proposals(device: torch.device) -> None:
    t, t_env = rising(4, 12), rising(4, 6)
    for edges in (t, t_env):
        edges[:, 0], edges[:, -1] = 0.0, 1.0
    w, w_env = torch.rand(4, 11, dtype=torch.float64) + 0.01, torch.rand(4, 5, dtype=torch.float64)
    expected = torch.zeros(4, 11, dtype=torch.float64)
    for ray in range(4):
        bound = torch.tensor(outer_bound(t[ray].tolist(), t_env[ray].tolist(), w_env[ray].tolist()))
        expected[ray] = (w[ray] - bound).clamp(min=0) ** 2 / w[ray]
    t, t_env, w, w_env = (x.to(device) for x in (t, t_env, w, w_env))
    torch.testing.assert_close(_lossfun_outer(t, w, t_env, w_env).cpu(), expected, rtol=1e-4, atol=1e-9)
    cdfs, cdfs_env = (torch.nn.functional.pad(x.cumsum(-1), (1, 0)) for x in (w, w_env))
    by_cdf = _pdf_loss(nerfacc.RayIntervals(t), cdfs, nerfacc.RayIntervals(t_env), cdfs_env)
    torch.testing.assert_close(by_cdf.cpu(), expected, rtol=1e-4, atol=1e-9)

    flat = [
        nerfacc.RayIntervals(
            edges.flatten(),
            packed_info([edges.shape[1]] * 4, device),
            is_left=(torch.arange(edges.numel(), device=device) % edges.shape[1]) < edges.shape[1] - 1,
            is_right=(torch.arange(edges.numel(), device=device) % edges.shape[1]) > 0,
        )
        for edges in (t, t_env)
    ]
    by_flat = _pdf_loss(flat[0], cdfs.flatten(), flat[1], cdfs_env.flatten())
    torch.testing.assert_close(by_flat, by_cdf.flatten())
    w_env.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: _lossfun_outer(t, w, t_env, x), w_env, nondet_tol=1e-12)


@pytest.mark.parametrize("counts", [[], [0, 1, 4, 0, 7]])
def test_distortion_is_the_double_sum(counts: list[int], device: torch.device) -> None:
    ray_indices = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64))
    edges = [rising(count + 1) for count in counts]
    t_starts = torch.cat([torch.zeros(0).double(), *(e[:-1] for e in edges)])
    t_ends = torch.cat([torch.zeros(0).double(), *(e[1:] for e in edges)])
    weights = torch.rand(sum(counts), dtype=torch.float64)
    expected = torch.zeros(len(counts), 1, dtype=torch.float64)
    middles = 0.5 * (t_starts + t_ends)
    for ray in range(len(counts)):
        w, m, d = (x[ray_indices == ray] for x in (weights, middles, t_ends - t_starts))
        expected[ray] = (w[:, None] * w * (m[:, None] - m).abs()).sum() + (w**2 * d).sum() / 3
    given = [x.to(device) for x in (weights, t_starts, t_ends, ray_indices)]
    torch.testing.assert_close(nerfacc.distortion(*given, len(counts)).cpu(), expected)
    given[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda w: nerfacc.distortion(w, *given[1:], len(counts)), given[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nerfacc.importance_sampling(nerfacc.RayIntervals(torch.ones(2, 3)), torch.ones(2, 2), 2), "cdfs must"),
        (
            lambda: nerfacc.importance_sampling(nerfacc.RayIntervals(torch.ones(2, 3)), torch.ones(2, 3), 0),
            "at least 1",
        ),
        (
            lambda: nerfacc.importance_sampling(nerfacc.RayIntervals(torch.ones(2, 0)), torch.ones(2, 0), 1),
            "have edges",
        ),
        (lambda: nerfacc.importance_sampling(nerfacc.RayIntervals(torch.ones(3)), torch.ones(3), 1), "packed_info"),
        (
            lambda: nerfacc.importance_sampling(
                nerfacc.RayIntervals(torch.ones(2, 3)), torch.ones(2, 3), torch.ones(3).long()
            ),
            "n_intervals_per_ray must have shape",
        ),
        (
            lambda: nerfacc.searchsorted(nerfacc.RayIntervals(torch.ones(2, 3)), nerfacc.RayIntervals(torch.ones(3))),
            "both be batched",
        ),
        (lambda: _sample_from_weighted(torch.ones(2, 3), torch.ones(2, 3), 2), "one element more"),
        (
            lambda: nerfacc.distortion(torch.ones(2), torch.ones(2), torch.ones(3), torch.zeros(2).long(), 1),
            "t_ends has",
        ),
    ],
)
def test_wrong_arguments_are_told_in_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as error:
        call()
    assert "\n" not in str(error.value)
