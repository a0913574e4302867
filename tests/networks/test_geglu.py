"""GEGLU: PyTorch on a CPU, the kernel on a GPU and in Triton's interpreter, against the twin."""

from __future__ import annotations

import pytest
import torch
from geglu_cases import DTYPES, SHAPES, run
from interpreting import needs_triton, run_interpreted

from dreamfusion_fast.networks.geglu import geglu, geglu_reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_twin(shape: tuple[int, int], dtype: str, device: torch.device) -> None:
    run(shape, dtype, device)


@needs_triton
def test_the_kernel_matches_the_twin_in_the_interpreter() -> None:
    assert run_interpreted("networks/geglu_cases.py") == {}


def test_the_twin_is_diffusers_layer() -> None:
    from diffusers.models.activations import GEGLU

    layer = GEGLU(5, 7).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(geglu_reference(layer.proj(x)), layer(x))
    torch.testing.assert_close(geglu(layer.proj(x)), layer(x))


def test_the_twin_is_differentiable() -> None:
    assert torch.autograd.gradcheck(geglu_reference, torch.randn(3, 6, dtype=torch.float64, requires_grad=True))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="x must have an even number of columns, got 3"):
        geglu(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"x must be contiguous, got strides \(1, 2\)"):
        geglu(torch.randn(4, 2).t())
    with pytest.raises(ValueError, match=r"x must have shape \[n, 2 c\], got \[2\]"):
        geglu(torch.randn(2))
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        geglu(torch.ones(2, 4, dtype=torch.int64))
