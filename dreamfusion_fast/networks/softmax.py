"""Softmax of attention's scores and its gradient, each in one pass over memory.

    P = softmax(scale S),   dS = scale P * (dP - sum(P * dP)),   over each row

Scores are float32, which a product of 16-bit numbers can leave them: they go into an exponential, so that rounding one
of 50 to float16 would cost 2 %. Shares are within 0 to 1 and multiplied by 16-bit numbers next, so they are rounded at
once. In PyTorch, scaling, softmax and rounding are passes of their own over numbers of four bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dreamfusion_fast.networks.group_norm import DTYPES
from dreamfusion_fast.ops._checks import check_tensor
from dreamfusion_fast.ops._triton import on_its_device, triton_serves

# A row is held in registers; longer ones are left to PyTorch.
_LONGEST = 32768


@on_its_device
def scaled_softmax(scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """`[n, c]` contiguous, float32 or float64, to the shares `[n, c]` in `dtype`; float32 arithmetic at least.

    Raises:
        TypeError, ValueError: another dtype or shape, or rows that are not contiguous.
    """
    _check("scaled_softmax", "scores", scores)
    if not _served(scores, scores):
        return scaled_softmax_reference(scores, scale, dtype)
    from dreamfusion_fast.networks._triton import softmax_kernel  # triton takes a while to import

    shares = torch.empty_like(scores, dtype=dtype)
    block, warps = _launch(scores)
    softmax_kernel[(len(scores),)](scores, shares, scores.shape[1], scale, BLOCK=block, num_warps=warps)
    return shares


@on_its_device
def scaled_softmax_backward(shares: Tensor, grad_shares: Tensor, scale: float) -> Tensor:
    """The gradient of the scores, in the dtype of the shares.

    Args:
        shares: `[n, c]` contiguous, of `scaled_softmax`.
        grad_shares: `[n, c]` contiguous, float32 or float64.
        scale: as there.

    Raises:
        TypeError, ValueError: another dtype or shape, or rows that are not contiguous.
    """
    _check("scaled_softmax_backward", "shares", shares)
    _check("scaled_softmax_backward", "grad_shares", grad_shares)
    if grad_shares.shape != shares.shape:
        raise ValueError(
            f"scaled_softmax_backward: grad_shares must have the shape of shares, {list(shares.shape)}, "
            f"got {list(grad_shares.shape)}"
        )
    if not _served(shares, grad_shares):
        return scaled_softmax_backward_reference(shares, grad_shares, scale)
    from dreamfusion_fast.networks._triton import softmax_backward_kernel

    grad_scores = torch.empty_like(shares)
    block, warps = _launch(shares)
    softmax_backward_kernel[(len(shares),)](
        shares, grad_shares, grad_scores, shares.shape[1], scale, BLOCK=block, num_warps=warps
    )
    return grad_scores


def scaled_softmax_reference(scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The twin of `scaled_softmax`, in plain PyTorch; differentiable."""
    return torch.softmax(scores * scale, dim=-1).to(dtype)


def scaled_softmax_backward_reference(shares: Tensor, grad_shares: Tensor, scale: float) -> Tensor:
    """The twin of `scaled_softmax_backward`, in plain PyTorch."""
    wide = shares.to(grad_shares.dtype)
    centred = grad_shares - (wide * grad_shares).sum(dim=-1, keepdim=True)
    return (scale * wide * centred).to(shares.dtype)


def _check(op: str, name: str, x: Tensor) -> None:
    check_tensor(op, name, x, ["n", "c"], DTYPES)
    if not x.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {x.stride()}")


def _served(narrow: Tensor, wide: Tensor) -> bool:
    """Whether the kernels take them: no float64, no empty ones, rows that fit into registers."""
    fits = narrow.numel() > 0 and narrow.shape[1] <= _LONGEST
    return fits and torch.float64 not in (narrow.dtype, wide.dtype) and triton_serves(narrow.device)


def _launch(x: Tensor) -> tuple[int, int]:
    """Numbers of a program, and its warps: 32 numbers or fewer for each of its threads."""
    block = 1 << max(x.shape[1] - 1, 0).bit_length()
    return block, min(max(block // 1024, 1), 32)
