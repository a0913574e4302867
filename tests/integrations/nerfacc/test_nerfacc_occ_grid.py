"""nerfacc's occupancy estimator: where it samples, and what it prunes."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable

import pytest
import torch
from grids import expected_intervals, random_rays
from torch import Tensor

from dreamfusion_fast.integrations import nerfacc

BOX = [-1.0, -1.0, -1.0, 1.0, 1.0, 1.0]


def filled(device: torch.device, resolution: int = 8, levels: int = 1, share: float = 0.5) -> nerfacc.OccGridEstimator:
    """An estimator with random cells occupied."""
    estimator = nerfacc.OccGridEstimator(BOX, resolution, levels).to(device)
    estimator.binaries.copy_(torch.rand(estimator.binaries.shape) < share)
    return estimator


def agree(actual: tuple[Tensor, Tensor, Tensor], expected: list[tuple[int, float, float]]) -> None:
    """All but a few intervals, whose middles a rounding of float32 puts into another cell, are the same."""
    key = {(ray, round(start * 1e4)) for ray, start, _ in expected}
    key |= {(ray, k + d) for ray, k in key for d in (-1, 1)}
    rays, t_starts, t_ends = (x.tolist() for x in actual)
    unknown = [r for r, t in zip(rays, t_starts, strict=True) if (r, round(t * 1e4)) not in key]
    assert abs(len(rays) - len(expected)) + len(unknown) <= 0.01 * len(expected)
    assert rays == sorted(rays)
    assert all(a < b for a, b in zip(t_starts, t_ends, strict=True))


@pytest.mark.parametrize("cone_angle", [0.0, 0.03])
@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("planes", ["numbers", "each"])
def test_samples_lie_in_occupied_cells(levels: int, cone_angle: float, planes: str, device: torch.device) -> None:
    estimator = filled(device, levels=levels)
    rays_o, rays_d = random_rays(23, device, torch.float32)
    near, far = [0.7] * 23, [2.5] * 23
    kwargs: dict[str, object] = {"near_plane": 0.7, "far_plane": 2.5}
    if planes == "each":
        lows, highs = torch.linspace(0.0, 2.0, 23), torch.linspace(2.0, 4.0, 23)
        near, far = [max(t, 0.7) for t in lows.tolist()], [min(t, 2.5) for t in highs.tolist()]
        kwargs |= {"t_min": lows.to(device), "t_max": highs.to(device)}
    actual = estimator.sampling(rays_o, rays_d, render_step_size=0.03, cone_angle=cone_angle, **kwargs)
    ray_indices, t_starts, t_ends = actual
    assert (ray_indices.dtype, t_starts.dtype, t_ends.dtype) == (torch.int64, torch.float32, torch.float32)
    boxes, cells = estimator.aabbs.double().cpu(), estimator.binaries.cpu()
    expected = expected_intervals(rays_o.double(), rays_d.double(), boxes, cells, near, far, 0.03, cone_angle)
    assert len(expected) > 100
    agree(actual, expected)


@pytest.mark.parametrize(
    ("resolution", "levels", "box"),
    [(8, 1, BOX), (7, 1, [-1, -0.5, -1, 1, 0.5, 0.7]), (8, 4, BOX), (6, 2, [-1, -0.5, -1, 1, 0.5, 0.7])],
)
def test_both_ways_to_march_agree(
    resolution: int, levels: int, box: list[float], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cubes of cells go the quick way, and other grids that of traverse_grids."""
    estimator = nerfacc.OccGridEstimator(box, resolution, levels).to(device)
    estimator.binaries.copy_(torch.rand(estimator.binaries.shape) < 0.4)
    rays = random_rays(113, device, torch.float32)
    quick = estimator.sampling(*rays, render_step_size=0.013)
    monkeypatch.setattr(estimator._cells, "cascaded", lambda *given: False)
    slow = estimator.sampling(*rays, render_step_size=0.013)
    assert slow[0].shape[0] > 2000
    agree(quick, list(zip(*(x.tolist() for x in slow), strict=True)))


def test_unlike_resolutions_and_boxes_that_are_not_nested(device: torch.device) -> None:
    estimator = nerfacc.OccGridEstimator(BOX, [4, 5, 6], 2).to(device)
    assert estimator.binaries.shape == (2, 4, 5, 6)
    assert estimator.resolution.tolist() == [4, 5, 6]
    rays_o, rays_d = random_rays(23, device, torch.float32)
    for boxes in (estimator.aabbs.clone(), torch.tensor([[-1, -1, -1, 0, 1, 1], [0.2, -1, -1, 1, 0.8, 1.0]])):
        estimator.aabbs.copy_(boxes)
        estimator.binaries.copy_(torch.rand(2, 4, 5, 6) < 0.5)
        actual = estimator.sampling(rays_o, rays_d, render_step_size=0.05)
        cells = estimator.binaries.cpu()
        never, ever = [0.0] * 23, [math.inf] * 23
        agree(actual, expected_intervals(rays_o.double(), rays_d.double(), boxes.double(), cells, never, ever, 0.05))
    cubes = filled(device, 4, 2)
    assert cubes._cells.cascaded(cubes.binaries, cubes.aabbs)
    cubes.aabbs[1] *= 1.5
    assert not cubes._cells.cascaded(cubes.binaries, cubes.aabbs)


def test_a_step_of_none_is_one_sample_per_cell(device: torch.device) -> None:
    estimator = filled(device, 4, share=1.1)
    ray_o, ray_d = torch.tensor([[-3.0, 0.1, 0.1]], device=device), torch.tensor([[2.0, 0.0, 0.0]], device=device)
    _, t_starts, t_ends = estimator.sampling(ray_o, ray_d, render_step_size=0.0)
    assert t_starts.tolist() == pytest.approx([1.0, 1.25, 1.5, 1.75], abs=1e-6)
    assert t_ends.tolist() == pytest.approx([1.25, 1.5, 1.75, 2.0], abs=1e-6)


def test_cells_that_were_changed_count_at_once(device: torch.device) -> None:
    estimator = nerfacc.OccGridEstimator(BOX, 8).to(device)
    rays = random_rays(5, device, torch.float32)

    def samples() -> int:
        return estimator.sampling(*rays, render_step_size=0.1)[0].shape[0]

    assert samples() == 0  # empty at first
    estimator.binaries.fill_(True)
    every = samples()
    assert every > 20
    estimator.binaries[0, :4] = False
    assert 0 < samples() < every
    estimator.binaries = torch.ones_like(estimator.binaries)
    assert samples() == every
    with torch.inference_mode():
        estimator.binaries = torch.zeros(1, 8, 8, 8, dtype=torch.bool, device=device)
        assert samples() == 0
        estimator.binaries.fill_(True)  # a change that torch does not count
        assert samples() == every


def test_stratified_shifts_each_ray_by_a_part_of_a_step(device: torch.device) -> None:
    estimator = filled(device, share=1.1)
    rays_o = torch.tensor([[-3.0, 0.1, 0.1]], device=device).repeat(4000, 1)
    rays_d = torch.tensor([[1.0, 0.0, 0.0]], device=device).repeat(4000, 1)
    fixed = estimator.sampling(rays_o[:1], rays_d[:1], render_step_size=0.25)[1]
    torch.testing.assert_close(fixed.cpu(), torch.arange(2.0, 4.0, 0.25))
    ray_indices, t_starts, t_ends = estimator.sampling(rays_o, rays_d, render_step_size=0.25, stratified=True)
    torch.testing.assert_close(t_ends - t_starts, torch.full_like(t_starts, 0.25))
    shift = (t_starts / 0.25) % 1.0
    first = torch.ones_like(ray_indices, dtype=torch.bool)
    first[1:] = ray_indices[1:] != ray_indices[:-1]
    per_ray = shift[first]
    assert per_ray.shape == (4000,)
    difference = (shift - per_ray[ray_indices]).abs()
    assert torch.minimum(difference, 1 - difference).max() < 1e-4
    assert per_ray.mean().item() == pytest.approx(0.5, abs=0.03)
    assert per_ray.std().item() == pytest.approx(12**-0.5, abs=0.02)


@pytest.mark.parametrize("by", ["sigma", "alpha"])
def test_pruning(by: str, device: torch.device) -> None:
    estimator = filled(device)
    estimator.occs.fill_(0.3)
    rays = random_rays(41, device, torch.float32)
    everything = estimator.sampling(*rays, render_step_size=0.02)
    asked: list[tuple[Tensor, ...]] = []
    alphas = torch.rand(everything[0].shape, device=device) ** 3

    def function(*given: Tensor) -> Tensor:
        asked.append(given)
        return alphas if by == "alpha" else -torch.log1p(-alphas.double()).float() / 0.02

    functions = {f"{by}_fn": function}
    kept = estimator.sampling(*rays, **functions, render_step_size=0.02, alpha_thre=0.1, early_stop_eps=0.05)
    ray_indices, t_starts, t_ends = everything
    assert all(torch.equal(a, b) for a, b in zip(asked[0], (t_starts, t_ends, ray_indices), strict=True))
    light, ray, visible, unsure = 1.0, -1, [], 0
    for index, alpha in zip(ray_indices.tolist(), alphas.tolist(), strict=True):
        light = light if index == ray else 1.0
        ray = index
        visible.append(light >= 0.05 and alpha >= 0.1)
        unsure += abs(light - 0.05) < 1e-5 or abs(alpha - 0.1) < 1e-5
        light *= 1 - alpha
    assert unsure == 0
    assert 0 < sum(visible) < len(visible)
    mask = torch.tensor(visible, device=device)
    assert all(torch.equal(a, b[mask]) for a, b in zip(kept, everything, strict=True))
    # The mean occupancy is the highest threshold, and with neither limit nothing is asked.
    estimator.occs.fill_(0.02)
    lower = estimator.sampling(*rays, **functions, render_step_size=0.02, alpha_thre=0.1, early_stop_eps=0.0)
    assert lower[0].shape[0] == int((alphas >= 0.02).sum())
    asked.clear()
    same = estimator.sampling(*rays, **functions, render_step_size=0.02, alpha_thre=0.0, early_stop_eps=0.0)
    assert torch.equal(same[1], everything[1])
    assert asked == []


def test_nothing_is_asked_without_samples(device: torch.device) -> None:
    estimator = nerfacc.OccGridEstimator(BOX, 8).to(device)
    rays = random_rays(5, device, torch.float32)
    for given in (rays, tuple(x[:0] for x in rays)):
        found = estimator.sampling(*given, sigma_fn=lambda *x: pytest.fail("asked"), alpha_thre=0.01)
        assert [(x.shape, x.dtype) for x in found] == [
            ((0,), torch.int64),
            ((0,), torch.float32),
            ((0,), torch.float32),
        ]


def test_samples_of_a_render_are_summed_ray_by_ray(device: torch.device) -> None:
    """What `sampling` returns is known to the functions of a render: their sums are the same bits each time."""
    estimator = filled(device)
    rays = random_rays(113, device, torch.float32)
    ray_indices, t_starts, t_ends = estimator.sampling(*rays, render_step_size=0.01)
    sigmas, values = torch.rand_like(t_starts) * 10, torch.rand(t_starts.shape[0], 3, device=device)
    weights, _, _ = nerfacc.render_weight_from_density(t_starts, t_ends, sigmas, ray_indices=ray_indices, n_rays=113)
    sums = [nerfacc.accumulate_along_rays(weights, values, ray_indices, 113) for _ in range(2)]
    assert torch.equal(*sums)
    other = nerfacc.accumulate_along_rays(weights, values, ray_indices.clone(), 113)
    torch.testing.assert_close(sums[0], other)


def test_rays_of_16_bits_and_gradients_are_no_hindrance(device: torch.device) -> None:
    estimator = filled(device)
    rays_o, rays_d = (x.half() for x in random_rays(11, device))
    expected = estimator.sampling(rays_o.float(), rays_d.float(), render_step_size=0.05)
    actual = estimator.sampling(rays_o.requires_grad_(), rays_d.requires_grad_(), render_step_size=0.05)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert not actual[1].requires_grad


def test_two_threads_at_once(device: torch.device) -> None:
    """One estimator, sampled, rendered and changed by threads: each gets what it gets alone."""
    estimator = filled(device, levels=2)
    batches = [random_rays(97, device, torch.float32) for _ in range(2)]

    def render(rays: tuple[Tensor, Tensor]) -> Tensor:
        n = rays[0].shape[0]
        ray_indices, t_starts, t_ends = estimator.sampling(*rays, render_step_size=0.02)
        sigmas = (t_starts * 3).requires_grad_()
        weights, _, _ = nerfacc.render_weight_from_density(t_starts, t_ends, sigmas, ray_indices=ray_indices, n_rays=n)
        image = nerfacc.accumulate_along_rays(weights, t_starts[:, None], ray_indices, n)
        image.sum().backward()
        assert sigmas.grad is not None
        return torch.cat([image.detach().flatten(), sigmas.grad])

    expected = [render(rays) for rays in batches]
    failures: list[object] = []

    def work(i: int) -> None:
        try:
            for _ in range(30):
                estimator.binaries.logical_or_(estimator.binaries)  # another version, the same cells
                if not torch.equal(render(batches[i]), expected[i]):
                    failures.append(i)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_state_dicts_are_those_of_nerfacc(device: torch.device) -> None:
    estimator = filled(device, [4, 5, 6], 2)
    state = estimator.state_dict()
    kinds = {name: (list(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    assert kinds == {
        "resolution": ([3], torch.int32),
        "aabbs": ([2, 6], torch.float32),
        "occs": ([240], torch.float32),
        "binaries": ([2, 4, 5, 6], torch.bool),
    }
    theirs = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in kinds.items()}
    theirs["aabbs"], theirs["resolution"] = state["aabbs"].cpu(), state["resolution"].cpu()
    theirs["occs"], theirs["binaries"] = torch.rand(240), torch.rand(2, 4, 5, 6) > 0.5
    other = nerfacc.OccGridEstimator(BOX, [4, 5, 6], 2).to(device)
    rays = random_rays(31, device, torch.float32)
    assert other.sampling(*rays, render_step_size=0.1)[0].shape == (0,)
    other.load_state_dict(theirs)  # strict
    assert torch.equal(other.binaries.cpu(), theirs["binaries"])
    assert other.sampling(*rays, render_step_size=0.1)[0].shape[0] > 0
    other.load_state_dict(state)
    for a, b in zip(*(e.sampling(*rays, render_step_size=0.1) for e in (other, estimator)), strict=True):
        assert torch.equal(a, b)
    twin = copy.deepcopy(estimator)
    twin.binaries.fill_(False)
    assert twin.sampling(*rays, render_step_size=0.1)[0].shape == (0,)
    assert estimator.sampling(*rays, render_step_size=0.1)[0].shape[0] > 0


def test_the_box_and_the_levels() -> None:
    box = torch.tensor([0.0, -1.0, 2.0, 2.0, 1.0, 3.0])
    estimator = nerfacc.OccGridEstimator(roi_aabb=box, resolution=torch.tensor([2, 3, 4]), levels=3)
    assert estimator.aabbs.tolist() == [[0, -1, 2, 2, 1, 3], [-1, -2, 1.5, 3, 2, 3.5], [-3, -4, 0.5, 5, 4, 4.5]]
    assert (estimator.levels, estimator.cells_per_lvl) == (3, 24)
    assert estimator.grid_coords.tolist() == [[x, y, z] for x in range(2) for y in range(3) for z in range(4)]
    assert estimator.grid_indices.tolist() == list(range(24))
    assert estimator.device == torch.device("cpu")
    assert estimator.half().aabbs.dtype == estimator.double().occs.dtype == torch.float32


def sampled(**kwargs: object) -> object:
    rays_o, rays_d = random_rays(3, torch.device("cpu"), torch.float32)
    given: dict[str, object] = {"rays_o": rays_o, "rays_d": rays_d, "render_step_size": 0.1, **kwargs}
    return filled(torch.device("cpu")).sampling(**given)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nerfacc.OccGridEstimator([0, 1]), "roi_aabb must have shape"),
        (lambda: nerfacc.OccGridEstimator(BOX, [4, 4]), "resolution must be"),
        (lambda: nerfacc.OccGridEstimator(BOX, 0), "resolution must be"),
        (lambda: nerfacc.OccGridEstimator(BOX, 4, 0), "levels must be"),
        (lambda: nerfacc.OccGridEstimator(BOX, 4, contraction_type=None), "contraction_type"),
        (lambda: sampled(rays_o=torch.zeros(3)), "rays_o must have shape"),
        (lambda: sampled(rays_d=torch.zeros(4, 3)), "rays_d must have shape"),
        (lambda: sampled(rays_o=torch.zeros(3, 3).long()), "rays_o must be"),
        (lambda: sampled(t_min=torch.zeros(4)), "t_min must have shape"),
        (lambda: sampled(t_max=1.0), "t_max must be"),
        (lambda: sampled(sigma_fn=lambda a, b, i: a[:, None]), "what sigma_fn returns must have shape"),
        (lambda: sampled(alpha_fn=lambda a, b, i: None), "what alpha_fn returns must be"),
        (lambda: sampled(cone_angle=-1.0), "cone_angle must be"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as error:
        call()
    assert "\n" not in str(error.value)
