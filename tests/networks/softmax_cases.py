"""Cases of the scaled softmax: run by pytest, and as a script by Triton's interpreter in a process of its own."""

from __future__ import annotations

from functools import partial

import torch
from interpreting import print_failures

from dreamfusion_fast.networks.softmax import (
    scaled_softmax,
    scaled_softmax_backward,
    scaled_softmax_backward_reference,
    scaled_softmax_reference,
)

SHAPES = [(1, 1), (113, 7), (3, 1023), (2, 1025), (2, 16384), (0, 4), (4, 0)]
LONG = (2, 40000)  # longer than the kernels take
DTYPES = ["float16", "bfloat16", "float32"]
SCALE = 0.3


def run(shape: tuple[int, int], dtype: str, device: torch.device, truncates: bool = False) -> None:
    """Against the twins in float64 of the same rounded numbers.

    Args:
        shape: of the scores.
        dtype: of the shares.
        truncates: whether bfloat16 numbers are cut off and not rounded, as Triton's interpreter does.
    """
    generator = torch.Generator().manual_seed(shape[0] + shape[1])
    scores = (40 * torch.randn(shape, generator=generator)).to(device)
    grad = torch.randn(shape, generator=generator).to(device)
    kind = getattr(torch, dtype)
    shares = scaled_softmax(scores, SCALE, kind)
    assert (shares.shape, shares.dtype) == (scores.shape, kind)
    eps, smallest = torch.finfo(kind).eps, torch.finfo(kind).smallest_normal * torch.finfo(kind).eps
    smallest = max(smallest, torch.finfo(torch.float32).smallest_normal)  # below, exponentials are flushed to zero
    roundings = 1.1 if truncates and dtype == "bfloat16" else 0.51
    wanted = scaled_softmax_reference(scores.double(), SCALE, torch.float64)
    # Beside rounding: exponents in float32, of up to 60, and their sum.
    _close(shares, wanted, (roundings * eps + 2e-5) * wanted + smallest)
    grad_scores = scaled_softmax_backward(shares, grad, SCALE)
    assert (grad_scores.shape, grad_scores.dtype) == (shares.shape, kind)
    wanted = scaled_softmax_backward_reference(shares.double(), grad.double(), SCALE)
    _close(grad_scores, wanted, roundings * eps * wanted.abs() + 2e-6 * shares.double() + smallest)


def _close(found: torch.Tensor, wanted: torch.Tensor, bound: torch.Tensor) -> None:
    assert bool(((found.double() - wanted).abs() <= bound).all()), float(
        ((found.double() - wanted).abs() - bound).max()
    )


if __name__ == "__main__":
    cpu = torch.device("cpu")
    print_failures({f"{s} {d}": partial(run, s, d, cpu, truncates=True) for s in SHAPES for d in DTYPES})
