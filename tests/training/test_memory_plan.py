"""Memory plans: sizes as people write them, the first rung that fits, what is said of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fakes import BallGuidance

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance.memory import GuidanceMemory
from dreamfusion_fast.rendering.config import RendererConfig
from dreamfusion_fast.training.memory_plan import (
    SMALL_BUDGET,
    MemoryLimit,
    MemoryPlan,
    MemoryPlanner,
    capped,
    parse_memory,
    shown,
)

CPU = torch.device("cpu")
MB, GB = 10**6, 10**9


class LargeGuidance(BallGuidance):
    """Says that it needs what a latent diffusion model does, and can save."""

    name = "large"
    needs = GuidanceMemory(
        weights=2 * GB, encode=1500 * MB, encode_recomputed=500 * MB, unet=200 * MB, offloadable=1500 * MB
    )

    def memory_needs(self, batch, render_size):
        return self.needs

    def set_recompute(self, on):
        self.recompute = on

    def set_offload(self, on):
        self.offload = on


def planner_of(limit, guidance=None, batch=4, size=64, renderer=None):
    limit = MemoryLimit(limit, "--memory X")
    return MemoryPlanner(guidance or LargeGuidance(), renderer or RendererConfig(), batch, size, 10 * MB, limit, CPU)


@pytest.mark.parametrize(
    ("memory", "size"),
    [
        ("16GB", 16 * 10**9),
        ("16GiB", 16 * 2**30),
        ("16000MB", 16 * 10**9),
        ("16000000000", 16 * 10**9),
        ("1.5 gb", 1_500_000_000),
        (" 512 MiB ", 512 * 2**20),
        ("7 B", 7),
        ("3kb", 3000),
        (16_000_000_000, 16 * 10**9),
        (2**53 + 1, 2**53 + 1),
        (1, 1),
    ],
)
def test_sizes(memory, size):
    assert parse_memory(memory) == size


@pytest.mark.parametrize(
    "memory",
    ["", "GB", "lots", "-3GB", "0", "16 apples", "16G", "1e9", "0.2B", 0, -16_000_000_000, True, False, 1.6e10, [1]],
)
def test_what_is_no_size_is_refused(memory):
    with pytest.raises(UserError, match=r"memory has to be a size such as 16GB, .* plain bytes above 0, not ") as error:
        parse_memory(memory)
    assert str(error.value).endswith(f" not {memory!r}")


def test_sizes_are_shown_for_people():
    assert [shown(size) for size in (16 << 20, 999 * MB, GB, 15_940_000_000)] == [
        "17 MB",
        "999 MB",
        "1.0 GB",
        "15.9 GB",
    ]


def test_the_ladder():
    ladder = planner_of(100 * GB).ladder
    assert ladder == [
        MemoryPlan(4, 128 << 20),
        MemoryPlan(4, SMALL_BUDGET, False),
        MemoryPlan(2, SMALL_BUDGET, False),
        MemoryPlan(1, SMALL_BUDGET, False),
        MemoryPlan(1, SMALL_BUDGET, False, recompute=True),
        MemoryPlan(1, SMALL_BUDGET, False, recompute=True, offload=True),
    ]


def test_each_rung_needs_less():
    planner = planner_of(100 * GB)
    expected = [planner.expected(plan) for plan in planner.ladder]
    assert sorted(set(expected), reverse=True) == expected
    # Weights; encoding and U-Net of 4 views; 4.5 times the parameters; 500 bytes a ray of 4 views; workspace.
    assert expected[0] == 2 * GB + 4 * 1700 * MB + 45 * MB + 4 * 64 * 64 * 500 + (128 << 20)
    assert expected[3] == 2 * GB + 1700 * MB + 45 * MB + 4 * 64 * 64 * 500 + SMALL_BUDGET
    assert expected[3] - expected[4] == 1000 * MB
    assert expected[4] - expected[5] == 1500 * MB


@pytest.mark.parametrize("rung", range(6))
def test_the_first_rung_that_fits_is_chosen(rung):
    expected = planner_of(100 * GB).expected(planner_of(100 * GB).ladder[rung])
    planner = planner_of(int(expected / 0.95) + 1)
    assert planner.choose() == planner.ladder[rung]
    assert planner_of(int(expected / 0.95) - 1).choose() != planner.ladder[rung] or rung == 5


def test_without_a_limit_nothing_changes_and_nothing_is_said():
    renderer = RendererConfig(samples_across=48)
    planner = planner_of(None, renderer=renderer)
    plan = planner.choose()
    assert plan == planner.ladder[0]
    assert plan.renderer_config(renderer) == renderer
    assert planner.lines(plan) == []


def test_a_budget_of_the_user_is_where_the_ladder_starts():
    small = planner_of(100 * GB, batch=1, guidance=BallGuidance(), renderer=RendererConfig(memory_budget=1 << 20))
    assert small.ladder == [MemoryPlan(1, 1 << 20), MemoryPlan(1, 1 << 20, False)]
    large = planner_of(100 * GB, batch=1, guidance=BallGuidance(), renderer=RendererConfig(memory_budget=1 << 30))
    assert large.ladder == [MemoryPlan(1, 1 << 30), MemoryPlan(1, SMALL_BUDGET, False)]


def test_a_guidance_that_says_nothing_needs_nothing():
    planner = planner_of(400 * MB, BallGuidance(), batch=2)
    assert planner.choose() == planner.ladder[0]
    parts = planner.parts(planner.ladder[0])
    assert parts["weights"] == parts["encoding"] == parts["U-Net"] == 0
    assert planner.ladder[0].render_budget == 50 * MB  # an eighth of the limit


def test_no_rung_that_saves_nothing():
    class Pixel(LargeGuidance):
        needs = GuidanceMemory(weights=2 * GB, unet=200 * MB)

    assert [(plan.recompute, plan.offload) for plan in planner_of(100 * GB, Pixel(), batch=1).ladder] == [
        (False, False),
        (False, False),
    ]


def test_what_is_said_of_a_plan():
    planner = planner_of(100 * GB)
    first, second = planner.lines(planner.choose())
    assert first.startswith("memory: 100.0 GB (--memory X); the run is expected to take 9.0 GB: weights 2.0 GB, ")
    assert second == "memory plan: it fits, nothing has to be saved"
    planner = planner_of(3500 * MB)
    _, second = planner.lines(planner.choose())
    assert second == (
        "memory plan: to need 2.8 GB, a render workspace of 17 MB, kept for no later render, 1 of 4 views at a time "
        "through the guidance, the encoding recomputed in its backward"
    )
    planner = planner_of(1 * GB)
    _, second = planner.lines(planner.choose())
    assert second.endswith(
        "the guidance's weights brought from main memory in each step; that may still be too much, and is tried"
    )


def test_weights_that_cannot_fit_are_refused():
    class Fixed(LargeGuidance):
        needs = dataclasses.replace(LargeGuidance.needs, offloadable=0)

    with pytest.raises(
        UserError, match=r"weights of guidance 'large' alone take 2\.0 GB, .* use 1\.0 GB \(--memory X\)"
    ):
        planner_of(1 * GB, Fixed()).choose()


def test_advice_names_what_would_fit():
    planner = planner_of(2 * GB, BallGuidance(), batch=4, size=1024)  # 2.1 GB of rays
    assert planner.advice(planner.ladder[-1]) == "--batch 1 would fit by estimate (586 MB in place of 2.2 GB)"
    planner = planner_of(400 * MB, BallGuidance(), batch=1, size=1024)
    assert planner.advice(planner.ladder[-1]).startswith("--schedule.render-size 512 would fit by estimate (")
    planner = planner_of(100 * MB, LargeGuidance(), batch=1, size=64)
    assert "use a smaller model" in planner.advice(planner.ladder[-1])
    planner = planner_of(None, BallGuidance(), batch=1, size=1024)
    assert planner.advice(planner.ladder[-1]).startswith("--schedule.render-size 512 would fit")


def test_the_limit_of_a_cpu_is_what_is_given():
    assert MemoryLimit.of(None, CPU) == MemoryLimit(None, "")
    assert MemoryLimit.of("2GB", CPU) == MemoryLimit(2 * GB, "--memory 2GB")
    assert MemoryLimit.of(2 * GB, CPU) == MemoryLimit(2 * GB, "--memory 2000000000")
    with pytest.raises(UserError, match="memory has to be a size"):
        MemoryLimit.of("much", CPU)
    with capped("2GB", CPU):  # nothing to cap
        pass


@pytest.mark.gpu
def test_the_limit_of_a_gpu_is_what_is_free_or_less():
    device = torch.device("cuda", torch.cuda.current_device())
    held = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    free = MemoryLimit.of(None, device)
    total = torch.cuda.mem_get_info(device)[1]
    assert free.size is not None
    assert 0 < free.size <= total - held.numel()
    allocated = torch.cuda.memory_allocated(device)
    assert MemoryLimit.of("1GB", device).size == GB - allocated
    assert MemoryLimit.of("100TB", device).size == pytest.approx(free.size, rel=0.01)
    with capped(GB, device):
        assert MemoryLimit.of(None, device).size == pytest.approx(GB - allocated, abs=4 * MB)


@pytest.mark.gpu
def test_a_cap_holds_within_and_not_after():
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.empty_cache()
    size = torch.cuda.memory_reserved(device) + 512 * MB
    with capped(str(size), device), pytest.raises(torch.OutOfMemoryError):
        torch.empty(GB, dtype=torch.uint8, device=device)
    assert torch.empty(GB, dtype=torch.uint8, device=device).numel() == GB
