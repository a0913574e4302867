"""GEGLU, the gate of the feed-forward layers of diffusion transformers, in one pass over memory.

    y = a * gelu(b),   x = [a, b],   gelu(b) = b * (1 + erf(b / sqrt(2))) / 2

(Shazeer 2020, "GLU Variants Improve Transformer"; the exact GELU of Hendrycks and Gimpel 2016, not its approximation by
tanh). In PyTorch it is two passes over halves of rows. There is no backward: it is for networks that are only
evaluated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dreamfusion_fast.networks.group_norm import ACTIVATIONS, DTYPES
from dreamfusion_fast.ops._checks import check_tensor
from dreamfusion_fast.ops._triton import on_its_device, triton_serves

_BLOCK = 1024


@on_its_device
def geglu(x: Tensor) -> Tensor:
    """`[n, 2 c]`, contiguous, to `[n, c]` of the same dtype; float32 arithmetic for 16 bits, rounded once.

    Raises:
        TypeError, ValueError: another dtype or shape, or rows that are not contiguous.
    """
    check_tensor("geglu", "x", x, ["n", "2 c"], DTYPES)
    if x.shape[1] % 2:
        raise ValueError(f"geglu: x must have an even number of columns, got {x.shape[1]}")
    if not x.is_contiguous():
        raise ValueError(f"geglu: x must be contiguous, got strides {x.stride()}")
    if x.dtype == torch.float64 or not triton_serves(x.device):
        return geglu_reference(x)
    n, columns = x.shape[0], x.shape[1] // 2
    y = x.new_empty(n, columns)
    if y.numel() > 0:
        from dreamfusion_fast.networks._triton import geglu_kernel  # triton takes a while to import

        geglu_kernel[(n, -(-columns // _BLOCK))](x, y, columns, ACTIVATIONS.index("gelu"), BLOCK=_BLOCK)
    return y


def geglu_reference(x: Tensor) -> Tensor:
    """The twin, in plain PyTorch, any float dtype, differentiable; 16 bits are widened before and rounded after."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    a, b = wide.chunk(2, dim=-1)
    return (a * torch.nn.functional.gelu(b)).to(x.dtype)
