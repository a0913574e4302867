"""The scaled softmax: PyTorch on a CPU, the kernels on a GPU and in Triton's interpreter, against the twins."""

from __future__ import annotations

import pytest
import torch
from interpreting import needs_triton, run_interpreted
from softmax_cases import DTYPES, LONG, SHAPES, run

from dreamfusion_fast.networks.softmax import (
    scaled_softmax,
    scaled_softmax_backward,
    scaled_softmax_backward_reference,
    scaled_softmax_reference,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, LONG])
def test_matches_the_twin(shape: tuple[int, int], dtype: str, device: torch.device) -> None:
    run(shape, dtype, device)


@needs_triton
def test_the_kernels_match_the_twins_in_the_interpreter() -> None:
    assert run_interpreted("networks/softmax_cases.py") == {}


def test_the_twins_are_a_function_and_its_gradient() -> None:
    scores = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    shares = scaled_softmax_reference(scores, 1.7, torch.float64)
    grad = torch.randn(5, 7, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(shares, scores, grad)
    torch.testing.assert_close(scaled_softmax_backward_reference(shares.detach(), grad, 1.7), wanted)
    assert torch.autograd.gradcheck(lambda x: scaled_softmax_reference(x, 1.7, torch.float64), scores)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"scaled_softmax: scores must be contiguous, got strides \(1, 2\)"):
        scaled_softmax(torch.randn(4, 2).t(), 1.0, torch.float16)
    with pytest.raises(ValueError, match=r"scores must have shape \[n, c\], got \[2\]"):
        scaled_softmax(torch.randn(2), 1.0, torch.float16)
    with pytest.raises(ValueError, match=r"grad_shares must have the shape of shares, \[2, 3\], got \[2, 4\]"):
        scaled_softmax_backward(torch.rand(2, 3), torch.rand(2, 4), 1.0)
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        scaled_softmax(torch.ones(2, 4, dtype=torch.int64), 1.0, torch.float16)
