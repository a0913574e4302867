"""Fused MLP over buffers: torch products, kernels on a GPU and kernels in Triton's interpreter against the twins."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from interpreting import needs_triton, run_interpreted
from mlp_cases import Case, cases, run
from torch import Tensor

from dreamfusion_fast.ops import _mlp_launch, _mlp_torch
from dreamfusion_fast.ops.tiles.mlp import MlpGradients, prepared_backward, prepared_forward

CPU = torch.device("cpu")


def network(sizes: list[int], device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    weights = [torch.randn(b, a, device=device) / a**0.5 for a, b in pairwise(sizes)]
    return weights, [torch.randn(size, device=device) for size in sizes[1:]]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_passes_match_the_twin(case: Case, device: torch.device) -> None:
    """Torch products on the CPU, the kernels on the GPU."""
    run(case, device)


@pytest.mark.parametrize("case", cases()[::3], ids=str)
def test_blocks_of_rows_add_up(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, rows are taken in blocks: here of five."""
    monkeypatch.setattr(_mlp_torch, "_ROWS_ON_CPU", 5)
    assert case.n == 0 or case.n > 5
    run(case, CPU)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """The faults in each case when Triton's interpreter ran the kernels, in a process of its own."""
    return run_interpreted("ops/tiles/mlp_cases.py")


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("case", cases(), ids=str)
def test_kernels_in_the_interpreter_match_the_twin(case: Case, interpreted: dict[str, str]) -> None:
    assert interpreted[str(case)] == ""


def test_cases_are_named_apart() -> None:
    assert len({str(case) for case in cases()}) == len(cases())


def test_same_sums_every_time(device: torch.device) -> None:
    weights, biases = network([5, 16, 16, 2], device)
    x, grad_y = torch.randn(5003, 5, device=device), torch.randn(5003, 2, device=device)
    results = []
    for _ in range(2):
        gradients = MlpGradients(weights, biases)
        prepared_backward(x, weights, biases, "relu", "float32", grad_y, None, gradients, counted=False)(None)
        to_weights, to_biases = gradients.result()
        results.append([*to_weights, *to_biases])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("sizes", "second", "to_x", "launches"),
    [
        ((2048, 4096, 256), False, True, [(19, 0, True)]),  # the default network: one launch
        ((2048, 4096, 256), True, True, [(19, 0, True), (0, 19, False)]),
        ((4096, 16384, 512), False, False, [(1, 0, False), (2, 0, False), (16, 0, False)]),
        ((), True, True, [(0, 0, True)]),
        ((), True, False, []),
    ],
)
@needs_triton
def test_launches(sizes: tuple[int, ...], second: bool, to_x: bool, launches: list[tuple[int, int, bool]]) -> None:
    """Sums that do not fit into registers together are formed one after the other, and grad_x is written once."""
    assert _mlp_launch._plan(sizes, second, to_x) == launches


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_nothing_waits_and_a_graph_replays_it(precision: str) -> None:
    """Both passes captured in a CUDA graph, replayed with another x and another count, against calls without one."""
    device = torch.device("cuda")
    weights, biases = network([32, 64, 64, 4], device)
    kind = getattr(torch, precision)
    x, y = torch.randn(32, 1023, device=device).to(kind).t(), torch.empty(1023, 4, device=device)
    v, grad_y = torch.empty_like(x), torch.randn(1023, 4, device=device)
    u, grad_x = torch.randn(1023, 32, device=device), torch.empty(1023, 32, device=device)
    count = torch.tensor([1023], dtype=torch.int32, device=device)
    gradients = MlpGradients(weights, biases)
    forward = prepared_forward(x, weights, biases, "relu", precision, y, v)
    backward = prepared_backward(x, weights, biases, "relu", precision, grad_y, grad_x, gradients, u)

    def step() -> list[Tensor]:
        gradients.partials.zero_()
        forward(count)
        backward(count)
        to_weights, to_biases = gradients.result()
        assert to_biases is not None
        return [*to_weights, *to_biases]

    step()  # compiles
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn(1023, 32, device=device))
    count.fill_(700)
    for output in (y, v, grad_x):
        output.zero_()
    graph.replay()
    replayed = [t.clone() for t in (y, v, grad_x, *captured)]
    for output in (y, v, grad_x):
        output.zero_()
    expected = [*step(), y, v, grad_x]
    for actual, wanted in zip(replayed, [*expected[-3:], *expected[:-3]], strict=True):
        assert torch.equal(actual, wanted)
    assert not y[700:].any()
