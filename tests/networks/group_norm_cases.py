"""Cases of the group normalisation: run by pytest, and as a script by Triton's interpreter in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from interpreting import print_failures
from torch import Tensor
from torch.nn import functional as F

from dreamfusion_fast.networks.group_norm import (
    Activation,
    GroupNorm,
    group_norm_reference,
    measure,
    summed,
)


@dataclass(frozen=True)
class Case:
    """Sizes, type, and what is taken along."""

    n: int
    channels: int
    groups: int
    height: int
    width: int
    dtype: str = "float32"
    activation: Activation = "silu"
    offset: str = ""  # "": none; channels; images
    residual: bool = False
    skip: bool = False
    modulated: bool = False
    outlier: bool = False  # the first pixel

    def __str__(self) -> str:
        parts = [f"{self.n}x{self.channels}x{self.height}x{self.width}-{self.groups}-{self.dtype}"]
        parts += [self.activation]
        parts += [name for name in ("residual", "skip", "modulated", "outlier") if getattr(self, name)]
        return "-".join([*parts, self.offset] if self.offset else parts)


def cases(interpreted: bool = False) -> list[Case]:
    """Odd sizes, one pixel, groups of a number of channels that is no power of two, several tiles and blocks."""
    found = [
        Case(1, 4, 2, 1, 1),
        Case(2, 6, 2, 7, 5, offset="channels"),
        Case(2, 30, 10, 3, 11, activation="none", skip=True),
        Case(1, 320, 32, 9, 7, "float16", offset="images", residual=True),
        Case(3, 128, 32, 13, 31, "bfloat16", residual=True, skip=True, offset="channels"),
        Case(1, 96, 32, 23, 9, offset="images", skip=True),
        Case(0, 8, 2, 4, 4),
        Case(2, 8, 2, 0, 4),
        Case(1, 64, 4, 65, 33, outlier=True),
        Case(3, 6, 2, 7, 5, offset="channels", modulated=True),
        Case(2, 30, 10, 3, 11, activation="gelu", modulated=True, skip=True),
        Case(1, 64, 32, 23, 9, "float16", activation="gelu", offset="channels"),
        Case(2, 192, 16, 9, 7, "float16", activation="none", modulated=True),
    ]
    if not interpreted:
        found += [
            Case(1, 2560, 32, 8, 8, "bfloat16", activation="none"),
            Case(2, 224, 16, 33, 31, "bfloat16", offset="images", modulated=True),
        ]
    return found


# For the kernels alone: where they are not, torch does the work, and it takes a core seconds.
LARGE = [
    Case(2, 512, 32, 65, 33, "float16", offset="channels", residual=True, skip=True),
    Case(1, 960, 32, 64, 64, "float16", offset="images"),
    Case(1, 128, 32, 256, 255, "float32", skip=True),
]


def image(case: Case, device: torch.device, scale: float = 1.0, mean: float = 0.0) -> Tensor:
    values = mean + scale * torch.randn(case.n, case.channels, case.height, case.width, dtype=torch.float64)
    return values.to(device, getattr(torch, case.dtype)).contiguous(memory_format=torch.channels_last)


def run(case: Case, device: torch.device) -> None:
    """All functions against the twin in float64, given the same rounded numbers."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(case.channels + case.height)
    dtype = getattr(torch, case.dtype)
    # A mean that is large beside the deviation, as in these networks: sums of squares would lose it.
    x = image(case, device, mean=5.0)
    if case.outlier:
        x[:, :, 0, 0] = 1000.0
    residual = image(case, device, 0.5) if case.residual else None
    shape = {"": None, "channels": (case.channels,), "images": (case.n, case.channels)}[case.offset]
    offset = None if shape is None else torch.randn(shape, dtype=torch.float64).to(device, dtype)
    weight, bias = (torch.randn(case.channels, dtype=torch.float64).to(device, dtype) for _ in range(2))
    norm = GroupNorm(weight, bias, case.groups, 1e-5, case.activation)
    found = measure(norm, x, offset, residual)
    grad_y, skip = image(case, device), image(case, device) if case.skip else None
    torch.set_rng_state(generator_state)

    if case.offset != "images":
        wide = x.double() + (0 if offset is None else offset.double().reshape(1, -1, 1, 1))
        wide = wide if residual is None else wide + residual.double()
        for padding in (0, 1, 3):
            padded = summed(x, offset, residual, padding)
            assert padded.is_contiguous(memory_format=torch.channels_last)
            near(padded, torch.nn.functional.pad(wide, (0, padding, 0, padding)), dtype, 0.51)
    exact = x.double()
    if offset is not None:
        exact = exact + offset.double().reshape(-1, case.channels, 1, 1)
    if residual is not None:
        near(found.x, exact + residual.double(), dtype, 0.51)
        assert found.offset is None
        exact = found.x.double()
    y = found.normalised()
    grad_x = found.input_gradient(grad_y, skip)
    for result in (y, grad_x):
        assert result.shape == x.shape
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert result.dtype == dtype
    if exact.numel() == 0:
        return
    exact.requires_grad_()
    wanted = group_norm_reference(norm, exact)
    (gradient,) = torch.autograd.grad(wanted, exact, grad_y.double())
    if skip is not None:
        gradient = gradient + skip.double()
    near(y, wanted.detach(), dtype)
    if case.modulated:
        both = torch.randn(case.n, 2 * case.channels + 1, dtype=torch.float64).to(device, dtype)[:, 1:]
        scale, shift = both.double()[:, :, None, None].chunk(2, dim=1)
        plain = group_norm_reference(replace(norm, activation="none"), exact) * (1 + scale) + shift
        activate = {"none": torch.nn.Identity(), "silu": F.silu, "gelu": F.gelu}[case.activation]
        near(found.normalised(both), activate(plain), dtype)
    near(grad_x, gradient, dtype)


def near(actual: Tensor, expected: Tensor, dtype: torch.dtype, roundings: float = 0.6) -> None:
    """Within so many roundings of the largest value; float32 arithmetic inside adds some of its own.

    Triton's interpreter cuts bfloat16 numbers off instead of rounding them.
    """
    if expected.numel() == 0:
        return
    own = 128 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    if __name__ == "__main__" and dtype == torch.bfloat16:
        roundings += 0.5
    bound = (roundings * torch.finfo(dtype).eps + own) * max(1.0, expected.abs().max().item())
    error = (actual.double() - expected).abs().max().item()
    assert error <= bound, f"{error} where {bound} is allowed"


if __name__ == "__main__":
    print_failures({str(case): partial(run, case, torch.device("cpu")) for case in cases(interpreted=True)})
