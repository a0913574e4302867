"""RayBudget: how soon and how closely it reaches its target, bounds, tensors, state."""

from __future__ import annotations

import doctest
import json
from typing import Any

import pytest
import torch

from dreamfusion_fast.rendering import RayBudget, ray_budget

TARGET = 200_000


def per_ray(step: int) -> float:
    """Samples of a ray of a scene whose grid empties: 192 at first, 12 in the end."""
    return 12.0 + 180.0 * 0.9**step


def follow(budget: RayBudget, steps: int, first: int = 0, as_tensor: bool = False) -> list[int]:
    samples = []
    for step in range(first, first + steps):
        samples.append(round(budget.n_rays * per_ray(step)))
        budget.update(budget.n_rays, torch.tensor(samples[-1]) if as_tensor else samples[-1])
    return samples


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.9])
def test_reaches_its_target_and_stays(smoothing: float, as_tensor: bool) -> None:
    samples = follow(RayBudget(TARGET, smoothing=smoothing), 200, as_tensor=as_tensor)
    # Rounding down to a multiple of 128 rays of 12 samples.
    assert all(TARGET - 128 * 12.1 < count <= TARGET for count in samples[150:])
    if smoothing == 0.5:
        assert all(0.5 * TARGET < count <= 1.05 * TARGET for count in samples[4:])


def test_a_sudden_change_does_not_overshoot() -> None:
    budget = RayBudget(TARGET, initial_rays=1024)
    for _ in range(20):
        budget.update(budget.n_rays, 100 * budget.n_rays)
    assert budget.n_rays == TARGET // 100 // 128 * 128
    counts = []
    for _ in range(20):
        budget.update(budget.n_rays, 400 * budget.n_rays)
        counts.append(budget.n_rays)
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == TARGET // 400 // 128 * 128


def test_bounds_growth_and_multiples() -> None:
    budget = RayBudget(TARGET, initial_rays=300, min_rays=200, max_rays=5000, multiple=100)
    counts = []
    for _ in range(6):
        budget.update(budget.n_rays, 0)
        counts.append(budget.n_rays)
    assert counts == [600, 1200, 2400, 4800, 5000, 5000]
    budget.update(5000, 10**12)
    assert budget.n_rays == 200
    budget = RayBudget(TARGET, initial_rays=256)
    budget.update(0, 0)
    assert budget.n_rays == 256
    assert budget.state_dict()["samples_per_ray"] is None


def test_rays_other_than_those_advised_count_as_they_are() -> None:
    budget = RayBudget(TARGET, initial_rays=4096, smoothing=0.0)
    budget.update(1000, 40_000)
    assert budget.n_rays == TARGET // 40 // 128 * 128


def test_a_tensor_counts_one_update_later(device: torch.device) -> None:
    budget, numbers = (RayBudget(TARGET, initial_rays=1024) for _ in range(2))
    count = torch.zeros((), dtype=torch.int32, device=device)
    given = [60_000, 50_000, 90_000, 10_000]
    advised = []
    for value in given:
        count.fill_(value)  # one buffer for all steps, as a CUDA graph has it
        budget.update(1024, count)
        advised.append(budget.n_rays)
    wanted = [1024]
    for value in given[:-1]:
        numbers.update(1024, value)
        wanted.append(numbers.n_rays)
    assert advised == wanted
    budget.update(1024, 10)  # a number: both count
    numbers.update(1024, given[-1])
    numbers.update(1024, 10)
    assert budget.n_rays == numbers.n_rays


@pytest.mark.parametrize("as_tensor", [False, True])
def test_resuming(as_tensor: bool) -> None:
    whole, first = RayBudget(TARGET), RayBudget(TARGET)
    samples = follow(whole, 30, as_tensor=as_tensor)
    follow(first, 13, as_tensor=as_tensor)
    resumed = RayBudget(TARGET)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert follow(resumed, 17, 13, as_tensor=as_tensor) == samples[13:]
    assert resumed.state_dict() == whole.state_dict()


@pytest.mark.gpu
def test_an_update_does_not_wait_for_the_gpu() -> None:
    budget = RayBudget(TARGET)
    count = torch.tensor(1000, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        budget.update(100, count)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target_samples": 0}, ValueError, "target_samples: got 0, want at least 1"),
        ({"target_samples": 1e5}, TypeError, "target_samples: got 100000.0, want a whole number"),
        ({"multiple": 0}, ValueError, "multiple: got 0, want at least 1"),
        ({"initial_rays": 1000}, ValueError, "initial_rays: got 1000, want a multiple of 128"),
        ({"min_rays": 8192}, ValueError, "initial_rays: got 4096, want 8192 to 262144"),
        ({"max_rays": True}, TypeError, "max_rays: got True"),
        ({"smoothing": 1.0}, ValueError, "smoothing: got 1.0, want 0 to below 1"),
        ({"smoothing": float("nan")}, ValueError, "smoothing: got nan"),
    ],
)
def test_bad_settings_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        RayBudget(**{"target_samples": TARGET} | change)


def test_bad_updates_are_named_and_change_nothing() -> None:
    budget = RayBudget(TARGET)
    before = budget.state_dict()
    for given, error, message in (
        ((-1, 5), ValueError, "n_rays: got -1, want at least 0"),
        ((5, -1), ValueError, "n_samples: got -1"),
        ((5, 2.5), TypeError, "n_samples: got 2.5, want a whole number"),
        ((torch.tensor(3), 5), TypeError, r"n_rays: got tensor\(3\), want a whole number"),
        ((5, torch.ones(())), TypeError, r"n_samples: got torch.float32 \[\], want a 0-dim tensor of integers"),
        ((5, torch.ones(1, dtype=torch.int64)), TypeError, r"n_samples: got torch.int64 \[1\]"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            budget.update(*given)
    with pytest.raises(ValueError, match=r"^state: got the keys \['n_rays'\], want"):
        budget.load_state_dict({"n_rays": 128})
    assert budget.state_dict() == before


def test_docstring_examples() -> None:
    assert doctest.testmod(ray_budget, raise_on_error=False).failed == 0
