"""The profiler: times belong to the innermost stage and add up; first steps are left out; broken ones do not count."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from dreamfusion_fast.gpu.stages import stage
from dreamfusion_fast.training import profile
from dreamfusion_fast.training.profile import StepProfiler

CPU = torch.device("cpu")


class Clock:
    """A clock that only moves when told."""

    def __init__(self, patch):
        self.now = 0.0
        patch.setattr(profile.time, "perf_counter", lambda: self.now)

    def pass_ms(self, ms):
        self.now += ms / 1000


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def row(result, name):
    (cost,) = [cost for cost in result.stages if cost.name == name]
    return cost


def test_time_belongs_to_the_innermost_stage(clock):
    profiler = StepProfiler(CPU)
    for _ in range(30):
        with profiler.step(64, 2):
            clock.pass_ms(1)
            with stage("guidance"):
                clock.pass_ms(2)
                for _ in range(2):
                    with stage("encode"):
                        clock.pass_ms(4)
                with stage("unet"):
                    clock.pass_ms(8)
                clock.pass_ms(16)
            with stage("odd one"):
                clock.pass_ms(32)
        clock.pass_ms(1000)  # between steps
    result = profiler.result()
    assert [cost.name for cost in result.stages] == ["encode", "unet", "guidance", "odd one", "rest"]
    assert [cost.ms for cost in result.stages] == pytest.approx([8, 8, 18, 32, 1])
    assert result.whole.ms == pytest.approx(67)
    assert sum(cost.share for cost in result.stages) == pytest.approx(1.0)
    assert row(result, "odd one").share == pytest.approx(32 / 67)
    assert (result.size, result.batch, result.steady) == (64, 2, True)


def test_first_steps_are_left_out_and_some_are_for_memory(clock):
    profiler = StepProfiler(CPU)
    for k in range(30):
        with profiler.step(64, 1), stage("unet"):
            clock.pass_ms(1000 if k < 10 or k % 5 == 0 else k)
    result = profiler.result()
    assert result.whole.steps == 16
    assert result.whole.ms == pytest.approx(20)  # median of 11 to 29 without 15, 20 and 25
    assert row(result, "unet").ms == pytest.approx(20)


def test_stage_of_some_steps(clock):
    profiler = StepProfiler(CPU)
    for k in range(42):
        with profiler.step(64, 1):
            if k % 16 == 0:
                with stage("occupancy"):
                    clock.pass_ms(6)
            with stage("cameras"):
                clock.pass_ms(2)
    result = profiler.result()
    occupancy = row(result, "occupancy")
    assert (occupancy.steps, occupancy.ms, result.whole.steps) == (2, pytest.approx(6), 25)
    assert occupancy.share == pytest.approx(12 / (12 + 50))
    assert "in 2 of 25 steps" in result.table()


def test_each_size_is_a_matter_of_its_own(clock):
    profiler = StepProfiler(CPU)
    for size, steps, ms in ((32, 20, 1), (64, 40, 2), (128, 12, 3)):
        for _ in range(steps):
            with profiler.step(size, 1), stage("unet"):
                clock.pass_ms(ms)
    result = profiler.result()
    assert (result.size, result.whole.steps) == (64, 24)
    assert result.whole.ms == pytest.approx(2)


def test_few_steps_are_better_than_none(clock):
    profiler = StepProfiler(CPU)
    assert profiler.result() is None
    for _ in range(3):
        with profiler.step(64, 1):
            clock.pass_ms(5)
    result = profiler.result()
    assert (result.whole.steps, result.steady) == (3, False)
    assert "medians of 3 steps, the first ones included" in result.table()


def test_a_step_that_raises_does_not_count(clock):
    profiler = StepProfiler(CPU)
    for k in range(40):
        try:
            with profiler.step(64, 1), stage("unet"):
                clock.pass_ms(1000 if k % 2 else 1)
                if k % 2:
                    raise RuntimeError("out of memory")
        except RuntimeError:
            pass
    result = profiler.result()
    assert result.whole.ms == pytest.approx(1)
    with stage("unet"):  # nobody records
        clock.pass_ms(1)
    assert profiler.result() == result


def test_other_threads_do_not_count(clock):
    profiler = StepProfiler(CPU)

    def other():
        with stage("backward"):
            pass

    for _ in range(12):
        with profiler.step(64, 1):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
    assert [cost.name for cost in profiler.result().stages] == ["rest"]


def test_the_table(clock, monkeypatch):
    resident = iter([100 * 10**6, *[k * 10**6 for k in range(200, 600)]])
    monkeypatch.setattr(profile, "_resident_bytes", lambda: next(resident))
    profiler = StepProfiler(CPU)
    for _ in range(12):
        with profiler.step(64, 2):
            with stage("unet"):
                clock.pass_ms(7.5)
            with stage("encode backward"):
                clock.pass_ms(2.5)
    assert profiler.result().table().splitlines() == [
        "profile: medians of 1 steady steps, 64x64, 2 views, CPU",
        "stage                       ms   share  resident GB",
        "U-Net                     7.50   75.0%         0.15",
        "guidance backward         2.50   25.0%         0.15",
        "rest                      0.00    0.0%         0.15",
        "whole step               10.00  100.0%         0.15",
    ]


def test_memory_of_a_cpu_is_what_is_resident():
    before = profile._resident_bytes()
    if before is None:
        pytest.skip("this system does not say")
    profiler = StepProfiler(CPU)
    with profiler.step(64, 1), stage("unet"):
        block = torch.ones(100 << 20, dtype=torch.uint8)
    assert 100e6 < row(profiler.result(), "unet").peak < 200e6
    del block


def test_real_times():
    profiler = StepProfiler(CPU)
    for _ in range(12):
        with profiler.step(64, 1), stage("unet"):
            time.sleep(0.005)
    assert 5 <= row(profiler.result(), "unet").ms < 50


@pytest.mark.gpu
def test_gpu_times_and_peaks():
    device = torch.device("cuda")
    x = torch.rand(2048, 2048, device=device)
    profiler = StepProfiler(device)
    graph = torch.cuda.CUDAGraph()
    for k in range(30):
        with profiler.step(64, 1):
            with stage("unet"):
                if k == 2:  # a capture inside of a stage, and stages inside of the capture
                    with torch.cuda.graph(graph), stage("render forward"):
                        x @ x
                for _ in range(40):
                    x @ x
            with stage("encode"):
                torch.empty(100 << 20, dtype=torch.uint8, device=device)
    result = profiler.result()
    assert row(result, "unet").ms > 10 * row(result, "encode").ms > 0
    assert 100 << 20 <= row(result, "encode").peak < 250 << 20
    assert row(result, "encode").peak > row(result, "rest").peak
    assert "render forward" not in [cost.name for cost in result.stages]
    assert result.reserved >= 100 << 20


@pytest.mark.gpu
def test_profiling_on_a_gpu_makes_nothing_wait():
    device = torch.device("cuda")
    x = torch.rand(64, 64, device=device)
    profiler = StepProfiler(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            with profiler.step(64, 1), stage("unet"):
                x @ x
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert profiler.result().whole.steps == 5
