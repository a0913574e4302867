"""Cases of GEGLU: run by pytest, and as a script by Triton's interpreter in a process of its own."""

from __future__ import annotations

from functools import partial

import torch
from interpreting import print_failures

from dreamfusion_fast.networks.geglu import geglu, geglu_reference

SHAPES = [(1, 1), (113, 7), (3, 1023), (2, 1025), (5, 2560), (0, 4), (4, 0)]
DTYPES = ["float16", "bfloat16", "float32"]


def run(shape: tuple[int, int], dtype: str, device: torch.device, truncates: bool = False) -> None:
    """Against the twin in float64 of the same rounded numbers; large ones, too, where the gate is nought or one.

    Args:
        shape: of y.
        truncates: whether bfloat16 numbers are cut off and not rounded, as Triton's interpreter does.
    """
    generator = torch.Generator().manual_seed(shape[0] + shape[1])
    wide = 4 * torch.randn(shape[0], 2 * shape[1], generator=generator, dtype=torch.float64)
    x = wide.to(device, getattr(torch, dtype))
    y, wanted = geglu(x), geglu_reference(x.double())
    assert y.shape == shape
    assert y.dtype == x.dtype
    eps = torch.finfo(x.dtype).eps
    roundings = 4.0 if dtype == "float32" else 1.1 if truncates and dtype == "bfloat16" else 0.51
    # Beside rounding: erf in float32, near the lower end of the gate, where 1 + erf cancels.
    bound = roundings * eps * wanted.abs() + 1e-5
    assert bool(((y.double() - wanted).abs() <= bound).all()), float(((y.double() - wanted).abs() - bound).max())


if __name__ == "__main__":
    cpu = torch.device("cpu")
    print_failures({f"{s} {d}": partial(run, s, d, cpu, truncates=True) for s in SHAPES for d in DTYPES})
