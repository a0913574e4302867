"""Which device a run uses by itself."""

from __future__ import annotations

import pytest
import torch

from dreamfusion_fast.training import device


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.mark.filterwarnings("error")
def test_auto_is_the_gpu_with_its_core(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "cuda_available", lambda: True)
    assert device.resolve_device() == torch.device("cuda", 1)


def test_auto_leaves_a_gpu_without_its_core(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "cuda_available", lambda: False)
    monkeypatch.setattr(device, "cuda_reason", lambda: "there was no GPU when it was built")
    with pytest.warns(UserWarning, match="GPU is not used: there was no GPU when it was built; see dreamfusion-fast"):
        assert device.resolve_device("auto") == torch.device("cpu")


@pytest.mark.filterwarnings("error")
def test_auto_is_the_cpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.resolve_device() == torch.device("cpu")
