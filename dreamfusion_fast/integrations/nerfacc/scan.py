"""Running sums and products along rays, packed or batched."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dreamfusion_fast.integrations.nerfacc import _lazy
from dreamfusion_fast.integrations.nerfacc._packing import segment_starts


def inclusive_sum(inputs: Tensor, packed_info: Tensor | None = None, indices: Tensor | None = None) -> Tensor:
    """Sum of a ray's values up to and with each one: ``y_i = x_0 + ... + x_i``.

    Args:
        inputs: float `[n_samples]`, packed, with one of the next two; without them `[..., n_samples]`, each row a ray.
        packed_info: int64 `[n_rays, 2]`, first sample and number of samples of each ray; all samples are some ray's.
        indices: int64 `[n_samples]`, ray of each sample, never falling.

    Returns:
        Like `inputs`. Differentiable any number of times. With packed samples a GPU is waited for.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape.
    """
    return _scan("inclusive_sum", inputs, packed_info, indices, torch.add, torch.cumsum)


def exclusive_sum(inputs: Tensor, packed_info: Tensor | None = None, indices: Tensor | None = None) -> Tensor:
    """Sum of a ray's values before each one: ``y_i = x_0 + ... + x_{i-1}``, 0 for the first. See `inclusive_sum`."""
    return _scan("exclusive_sum", inputs, packed_info, indices, torch.add, torch.cumsum, before=0.0)


def inclusive_prod(inputs: Tensor, packed_info: Tensor | None = None, indices: Tensor | None = None) -> Tensor:
    """Product of a ray's values up to and with each one: ``y_i = x_0 * ... * x_i``. See `inclusive_sum`."""
    return _scan("inclusive_prod", inputs, packed_info, indices, torch.mul, torch.cumprod)


def exclusive_prod(inputs: Tensor, packed_info: Tensor | None = None, indices: Tensor | None = None) -> Tensor:
    """Product of a ray's values before each: ``y_i = x_0 * ... * x_{i-1}``, 1 for the first. See `inclusive_sum`."""
    return _scan("exclusive_prod", inputs, packed_info, indices, torch.mul, torch.cumprod, before=1.0)


def _scan(
    op: str,
    inputs: Tensor,
    packed_info: Tensor | None,
    indices: Tensor | None,
    combine: Callable[[Tensor, Tensor], Tensor],
    along_rows: Callable[..., Tensor],
    before: float | None = None,
) -> Tensor:
    """With `before`, what the first sample of a ray gets, the scan is exclusive."""
    _check(op, inputs, packed_info, indices)
    if packed_info is None and indices is None:
        if before is not None and inputs.shape[-1] > 0:
            inputs = torch.cat([torch.full_like(inputs[..., :1], before), inputs[..., :-1]], dim=-1)
        return along_rows(inputs, dim=-1)
    n_samples = inputs.shape[0]
    starts, longest = segment_starts(op, packed_info, indices, n_samples)
    inside = torch.arange(n_samples, device=inputs.device) - starts
    if before is not None and n_samples > 0:
        shifted = torch.cat([torch.full_like(inputs[:1], before), inputs[:-1]])
        inputs = torch.where(inside == 0, before, shifted)
    # Each round joins runs of `reach` samples to runs of twice that, within the ray: nothing of another ray gets into
    # a sum, not even a NaN or an infinite value.
    reach = 1
    while reach < longest:
        joined = combine(inputs[reach:], inputs[:-reach])
        inputs = torch.cat([inputs[:reach], torch.where(inside[reach:] >= reach, joined, inputs[reach:])])
        reach *= 2
    return inputs


def _check(op: str, inputs: Tensor, packed_info: Tensor | None, indices: Tensor | None) -> None:
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        got = inputs.dtype if isinstance(inputs, Tensor) else _lazy.shown(inputs)
        raise TypeError(f"{op}: inputs must be a float tensor, got {got}")
    if packed_info is not None and indices is not None:
        raise ValueError(f"{op}: want packed_info or indices, got both")
    if packed_info is None and indices is None:
        if inputs.dim() == 0:
            raise ValueError(f"{op}: inputs must have shape [..., n_samples], got a number")
        return
    if inputs.dim() != 1:
        raise ValueError(f"{op}: packed inputs must have shape [n_samples], got {list(inputs.shape)}")
    if packed_info is not None:
        _lazy.check_tensor(op, "packed_info", packed_info, ["n_rays", 2], (torch.int64, torch.int32))
    else:
        _lazy.check_tensor(op, "indices", indices, [inputs.shape[0]], (torch.int64, torch.int32))
