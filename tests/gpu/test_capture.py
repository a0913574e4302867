"""A captured function gives what the function gives, for every signature and after its weights have changed."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from dreamfusion_fast.gpu.capture import CapturedFunction


class Counting(nn.Module):
    """A layer that counts how often Python has gone through it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5).requires_grad_(False)
        self.calls = 0

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * scale


def test_on_a_cpu_it_is_the_function_itself() -> None:
    network = Counting()
    captured = CapturedFunction(network)
    x, scale = torch.randn(7, 3), torch.tensor(2.0)
    torch.testing.assert_close(captured(x, scale), network.layer(x) * 2, rtol=0, atol=0)
    assert not captured(x.requires_grad_(), scale).requires_grad
    assert network.calls == 2


@pytest.mark.gpu
def test_replays_with_new_values_and_new_weights_per_signature() -> None:
    network = Counting().cuda()
    captured = CapturedFunction(network)
    results = []
    for n in (1, 113, 1, 113):
        x, scale = torch.randn(n, 3, device="cuda"), torch.randn((), device="cuda")
        results.append((captured(x, scale), network.layer(x) * scale))
    calls = network.calls
    with torch.no_grad():
        network.layer.weight.mul_(2.0)
    x, scale = torch.randn(113, 3, device="cuda"), torch.randn((), device="cuda")
    results.append((captured(x, scale), network.layer(x) * scale))
    assert network.calls == calls  # replayed, not run again
    for given, expected in results:  # an earlier result is not overwritten by a later replay
        torch.testing.assert_close(given, expected)


@pytest.mark.gpu
def test_can_be_called_where_somebody_else_captures() -> None:
    captured = CapturedFunction(Counting().cuda())
    x, scale = torch.randn(9, 3, device="cuda"), torch.ones((), device="cuda")
    expected = captured(x, scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = captured(x, scale)
    graph.replay()
    torch.testing.assert_close(result, expected)


@pytest.mark.gpu
def test_cleared_graphs_give_their_memory_back_and_are_captured_again() -> None:
    network = Counting().cuda()
    captured = CapturedFunction(network)
    x, scale = torch.randn(1 << 22, 3, device="cuda"), torch.ones((), device="cuda")  # results of 84 MB
    expected = captured(x, scale)
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    captured.clear()
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < held - 100e6
    calls = network.calls
    torch.testing.assert_close(captured(x, scale), expected)
    assert network.calls > calls
