"""Adapters: nothing while they are off, W + B A while they are on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.networks.lora import LoraAdapters


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(6, 5), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out[0](torch.tanh(self.to_q(x) * self.to_k(x)) + self.to_v(x))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.proj = Attention(), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attn1(x))


def network(dtype: torch.dtype = torch.float64) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Network().to(dtype).requires_grad_(False)


def test_off_they_change_nothing_and_on_they_are_a_product() -> None:
    plain, adapted, x = network(), network(), torch.randn(7, 6, dtype=torch.float64)
    adapters = LoraAdapters(adapted, rank=2, generator=torch.Generator().manual_seed(1))
    names = [f"attn1/{layer}/{half}" for layer in ("to_q", "to_k", "to_v", "to_out/0") for half in "AB"]
    assert list(adapters.parameters) == names
    assert torch.equal(adapted(x), plain(x))
    with adapters.on():
        assert torch.equal(adapted(x), plain(x))  # B is zero
    merged = copy.deepcopy(plain)
    for value in adapters.parameters.values():
        nn.init.normal_(value, generator=torch.Generator().manual_seed(value.shape[0]))
    for name, layer in merged.named_modules():
        if isinstance(layer, nn.Linear) and name != "proj":
            a, b = (adapters.parameters[f"{name}.{half}".replace(".", "/")] for half in "AB")
            layer.weight = nn.Parameter(layer.weight + b.detach() @ a.detach())
    with adapters.on():
        torch.testing.assert_close(adapted(x), merged(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(merged(x), plain(x))
    assert torch.equal(adapted(x), plain(x))


def test_a_graph_outlives_the_block() -> None:
    adapted = network()
    adapters = LoraAdapters(adapted, rank=2)
    with adapters.on():
        output = adapted(torch.randn(3, 6, dtype=torch.float64))
    adapted(torch.randn(3, 6, dtype=torch.float64))
    gradients = torch.autograd.grad(output.sum(), list(adapters.parameters.values()))
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients[1::2])  # of B
    assert not any(parameter.requires_grad for name, parameter in adapted.named_parameters() if "lora" not in name)


@pytest.mark.parametrize(("dtype", "own"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_precision(dtype: torch.dtype, own: torch.dtype) -> None:
    adapted = network(dtype)
    adapters = LoraAdapters(adapted, rank=2)
    assert {value.dtype for value in adapters.parameters.values()} == {own}
    with adapters.on():
        assert adapted(torch.randn(3, 6).to(dtype)).dtype == dtype


def test_numbers_come_from_the_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, other = (LoraAdapters(network(), 2, generator=torch.Generator().manual_seed(5)).parameters for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], other[name]) for name in one)
    bound = 6**-0.5
    assert all(
        value.abs().max() <= bound and value.std() > 0.4 * bound for name, value in one.items() if name[-1] == "A"
    )


def test_networks_that_cannot_have_them_are_refused() -> None:
    with pytest.raises(UserError, match=r"no layers called .*to_out"):
        LoraAdapters(nn.Sequential(nn.Linear(2, 2)), 1)
    adapted = network()
    LoraAdapters(adapted, 1)
    with pytest.raises(ValueError, match="network: got one with adapters, want one without"):
        LoraAdapters(adapted, 1)
