"""Launches go to the GPU where the tensors lie, whichever is the current one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.networks.geglu import geglu, geglu_reference
from dreamfusion_fast.ops._triton import on_its_device


class OnSecondGpu(Tensor):
    """A tensor that says it is on cuda:1."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def get_device(self) -> int:
        return 1


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("by_name", [False, True])
def test_the_gpu_of_the_first_tensor_is_current(monkeypatch: pytest.MonkeyPatch, before: int, by_name: bool) -> None:
    now = before

    def exchange(index: int) -> int:
        nonlocal now
        previous, now = now, index
        return previous

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)

    @on_its_device
    def launch(settings: Any, x: Tensor) -> Any:
        return settings, now

    x = torch.ones(2).as_subclass(OnSecondGpu)
    assert (launch("a", x=x) if by_name else launch("a", x)) == ("a", 1)
    assert now == before


def test_on_a_cpu_and_without_tensors_nothing_changes() -> None:
    assert on_its_device(lambda x: x + 1)(torch.zeros(1)) == 1
    assert on_its_device(lambda: 3)() == 3


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_gpu() -> None:
    x = torch.randn(7, 64, device="cuda:1")
    with torch.cuda.device(0):
        torch.testing.assert_close(geglu(x), geglu_reference(x))
