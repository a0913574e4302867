"""Weights that are brought from main memory layer by layer: the same predictions, in a part of the memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.guidance import GuidanceConfig, GuidanceRequest, Views, create_guidance
from dreamfusion_fast.networks import offload as module
from dreamfusion_fast.networks.offload import can_stream_weights, stream_weights

pytestmark = pytest.mark.usefixtures("one_thread")

pytest.importorskip("accelerate")
Pipelines = Callable[..., Path]
VIEWS = (torch.tensor([3.1, 0.0]), torch.tensor([0.0, 0.1]))


def guidance_of(folder: Path, device: str, dtype: str) -> Any:
    return create_guidance(GuidanceConfig(name=str(folder), dtype=dtype, cache=False), torch.device(device))


def gradient_of(guidance: Any, device: str) -> Tensor:
    views = Views(*(value.to(device) for value in VIEWS))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    generator = torch.Generator().manual_seed(4)
    return guidance.gradient(GuidanceRequest(images, guidance.embed("a teapot"), views, generator=generator)).gradient


def is_streamed(unet: torch.nn.Module) -> bool:
    return any(hasattr(part, "_diffusers_hook") for part in unet.modules())


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["latent", "sdxl", "pixel", "sd3", "flux"])
def test_turned_on_and_off_between_steps(pipeline: Pipelines, kind: str) -> None:
    """Here from main memory to main memory: the hooks are the same."""
    guidance = guidance_of(pipeline(kind), "cpu", "float64")
    model, results = guidance.model, []
    for on in (False, True, True, False):
        guidance.set_offload(on)
        results.append(gradient_of(guidance, "cpu"))
        assert is_streamed(model._network) == on
    assert results[0].abs().max() > 0
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-14)


def test_setting_it_again_loads_nothing_again(pipeline: Pipelines) -> None:
    guidance = guidance_of(pipeline("latent"), "cpu", "float64")
    for on in (False, True):
        guidance.set_offload(on)
        guidance.load()
        before = guidance.model._network
        guidance.set_offload(on)
        guidance.load()
        assert guidance.model._network is before


def test_a_model_says_how_much_it_saves(pipeline: Pipelines, monkeypatch: pytest.MonkeyPatch) -> None:
    guidance = guidance_of(pipeline("latent"), "cpu", "float32")
    assert guidance.memory_needs(1, 64).offloadable == 0, "a CPU has no other memory"
    monkeypatch.setattr("dreamfusion_fast.guidance.models.pipelines.can_stream_weights", lambda device: True)
    needs = guidance.memory_needs(1, 64)
    guidance.load()
    unet = 4 * sum(parameter.numel() for parameter in guidance.model._network.parameters())
    assert needs.offloadable == int(0.9 * unet)


def test_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    assert can_stream_weights(gpu)
    assert not can_stream_weights(torch.device("cpu"))
    monkeypatch.setattr(module, "installed", lambda library: library != "accelerate")
    assert not can_stream_weights(gpu)


@pytest.mark.gpu
@pytest.mark.usefixtures("no_tf32")
@pytest.mark.parametrize("kind", ["latent", "sdxl", "pixel", "sd3", "flux"])
def test_on_a_gpu(pipeline: Pipelines, kind: str) -> None:
    guidance = guidance_of(pipeline(kind), "cuda:0", "float32")
    wanted = gradient_of(guidance, "cuda:0")
    guidance.set_offload(True)
    for _ in range(3):  # layers are prefetched from the second time on
        found = gradient_of(guidance, "cuda:0")
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
        assert all(parameter.device.type == "cpu" for parameter in guidance.model._network.parameters())


@pytest.mark.gpu
def test_few_layers_are_on_the_gpu_at_a_time() -> None:
    layers = [torch.nn.Linear(1024, 1024) for _ in range(32)]  # 134 MB
    network = torch.nn.Sequential(*layers).requires_grad_(False)
    x = torch.randn(8, 1024)
    with torch.no_grad():
        wanted = network(x)
        stream_weights(network, torch.device("cuda", 0))
        for _ in range(3):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            found = network(x.cuda())
            peak = torch.cuda.max_memory_allocated() - before
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-3, atol=1e-3)
    weights = sum(parameter.numel() * 4 for parameter in network.parameters())
    assert peak < 0.2 * weights + 40e6  # 32 MiB of it is cuBLAS's
