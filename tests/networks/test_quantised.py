"""Weights in 8 and 4 bits: near the same predictions, in the memory that is stated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance import GuidanceConfig, Views, create_guidance
from dreamfusion_fast.networks import quantised as module
from dreamfusion_fast.networks.offload import installed
from dreamfusion_fast.networks.quantised import LIBRARY, quantise, quantised_bytes

pytestmark = pytest.mark.usefixtures("one_thread")
Pipelines = Callable[..., Path]
CPU = torch.device("cpu")

# Largest relative errors of a product, of steps of 1/127 of a row's largest weight, 3 bits of mantissa, and 4 bits.
KINDS = [
    pytest.param(kind, most, marks=pytest.mark.skipif(not installed(library), reason=f"needs {library}"))
    for kind, most, library in (("int8", 0.01, "torchao"), ("float8", 0.04, "torchao"), ("nf4", 0.13, "bitsandbytes"))
]


class Network(nn.Module):
    """Blocks in a list, with layers in front and behind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 128)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(128, 256, bias=False), nn.Linear(256, 128)) for _ in "ab")
        self.last = nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def held_bytes(network: nn.Module) -> int:
    """Bytes of all weights, with the scales beside them."""
    total = 0
    for parameter in network.parameters():
        for part in (getattr(parameter, name, None) for name in ("qdata", "scale")):
            total += 0 if part is None else part.numel() * part.element_size()
        if not hasattr(parameter, "qdata"):
            total += parameter.numel() * parameter.element_size()
            state = getattr(parameter, "quant_state", None)
            total += 0 if state is None else state.absmax.numel() * state.absmax.element_size()
    return total


@pytest.mark.parametrize(("kind", "most"), KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_is_near_the_exact_one(kind: Any, most: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = Network().to(dtype).requires_grad_(False).eval()
    x = torch.randn(50, 64, dtype=dtype)
    exact, stated = network(x), quantised_bytes(network, kind, dtype)
    with torch.no_grad():
        alone = [layer(network.first(x)) for layer in network.blocks[0][:1]]
        quantise(network, kind, CPU)
        again = [layer(network.first(x)) for layer in network.blocks[0][:1]]
        found = network(x)
    error = (again[0] - alone[0]).norm() / alone[0].norm()
    assert 1e-4 < error < most
    assert (found - exact).norm() / exact.norm() < 3 * most, "four such layers in a row"
    assert found.dtype == dtype
    assert type(network.first) is type(network.last) is nn.Linear
    assert network.first.weight.dtype == dtype
    assert held_bytes(network) == pytest.approx(stated, rel=0.03)
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(("kind", "most"), KINDS)
@pytest.mark.parametrize("model", ["latent", "sd3", "flux"])
def test_a_pipeline_predicts_nearly_the_same(pipeline: Pipelines, model: str, kind: Any, most: float) -> None:
    pytest.importorskip("diffusers")
    views, results = Views(torch.tensor([3.1, 0.0]), torch.zeros(2)), []
    for weights in ("plain", kind):
        config = GuidanceConfig(name=str(pipeline(model)), dtype="float32", weights=weights, cache=False)
        guidance: Any = create_guidance(config)
        embeddings = guidance.embed("a teapot")
        noisy = torch.randn(2, 4 if model == "latent" else 16, 8, 8, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            condition = embeddings.select(("null", "text"), views)
            results.append(guidance.model.predict(noisy, torch.tensor([3, 90]), condition, views))
        needs = guidance.memory_needs(1, 64)
        assert needs.offloadable == 0
        results.append(needs.weights)
    plain, plain_bytes, found, found_bytes = results
    assert 1e-5 < (found - plain).norm() / plain.norm() < 3 * most
    assert found_bytes < plain_bytes


def test_what_is_absent_is_said_before_anything_is_loaded(pipeline: Pipelines, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setattr(module, "installed", lambda library: False)
    for kind, library in LIBRARY.items():
        with pytest.raises(UserError, match=f"weights {kind} needs {library}, not installed.*pip install {library}"):
            create_guidance(GuidanceConfig(name=str(pipeline("latent")), weights=kind))


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "most"), KINDS)
def test_on_a_gpu(kind: Any, most: float) -> None:
    device, dtype = torch.device("cuda", 0), torch.bfloat16
    network = nn.Module()
    network.blocks = nn.ModuleList([nn.Linear(1024, 1024) for _ in range(64)])  # 134 MB
    network.to(dtype).requires_grad_(False)
    x, stated = torch.randn(16, 1024).to(dtype), quantised_bytes(network, kind, dtype)
    exact = network.blocks[0](x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    quantise(network, kind, device)
    assert torch.cuda.memory_allocated() - before < 1.05 * stated + 2**20
    assert torch.cuda.max_memory_allocated() - before < stated + 32e6, "a layer at a time, as it was"
    found = network.blocks[0](x.to(device)).cpu()
    assert 1e-4 < (found - exact).norm() / exact.norm() < most
