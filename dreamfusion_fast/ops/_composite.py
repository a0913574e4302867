"""Checks and calls of the native functions, for all ops that composite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dreamfusion_fast.ops._checks import check_number, check_same_length, check_tensor, positive_in
from dreamfusion_fast.ops._native import call, pointer


def plain_offsets(offsets: Tensor) -> Tensor:
    """Offsets of 64 bits as the int32 that the ops take; all else as it is, for `check_offsets`.

    What does not fit stays out of range, and is found like any wrong offset; nothing waits for a GPU.
    """
    if (
        not isinstance(offsets, Tensor)
        or offsets.dtype != torch.int64
        or offsets.layout != torch.strided
        or offsets.is_nested
    ):
        return offsets
    return offsets.clamp(-1, torch.iinfo(torch.int32).max).to(torch.int32)


def widened(*arguments: Any) -> tuple[Any, ...]:
    """Tensors of 16 bits, such as autocast makes, in float32; all else as it is, for the checks. Differentiable."""
    halves = (torch.float16, torch.bfloat16)
    return tuple(a.float() if isinstance(a, Tensor) and a.dtype in halves else a for a in arguments)


def check_offsets(op: str, offsets: Tensor, like: Tensor) -> None:
    """Raises TypeError or ValueError unless they are int32 `[n_rays + 1]`."""
    check_tensor(op, "offsets", offsets, ["n_rays + 1"], dtypes=[torch.int32], like=like)
    if offsets.shape[0] < 1:
        raise ValueError(f"{op}: offsets must have n_rays + 1 elements, got none")


def check_samples(op: str, values: Tensor, t: Tensor, first_name: str, first: Tensor) -> None:
    """Raises TypeError or ValueError unless values `[n_samples, n_channels]` and t `[n_samples]` go with the first."""
    check_tensor(op, "values", values, ["n_samples", "n_channels"], like=first, same_dtype=True)
    check_same_length(op, "values", values, first_name, first)
    if values.shape[1] < 1:
        raise ValueError(f"{op}: values must have at least one channel, got {list(values.shape)}")
    check_tensor(op, "t", t, ["n_samples"], like=first, same_dtype=True)
    check_same_length(op, "t", t, first_name, first)


def check_step(op: str, step: float | Tensor, density: Tensor) -> None:
    """Raises TypeError or ValueError unless it is a positive number or a tensor `[n_samples]`."""
    if isinstance(step, Tensor):
        check_tensor(op, "step", step, ["n_samples"], like=density, same_dtype=True)
        check_same_length(op, "step", step, "density", density)
    else:
        check_number(op, "step", step, "positive and finite", positive_in(density.dtype))


def check_values(op: str, lengths: Tensor | None, offsets: Tensor, n_samples: int) -> None:
    """On the CPU alone, and inside the op, where tensors have values."""
    if offsets.device.type != "cpu":
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last > n_samples or bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError(
            f"{op}: offsets must rise from 0 to at most the number of samples: "
            f"there are {n_samples} samples, got offsets from {first} to {last}"
        )
    if lengths is None:
        return
    used = lengths[:last]
    if not bool(((used >= 0) & used.isfinite()).all()):
        lowest, highest = (float(bound) for bound in used.aminmax())
        raise ValueError(f"{op}: step must be finite and not below 0, got {lowest} to {highest}")


def forward(
    absorbing: Tensor, lengths: Tensor | None, step: float, alphas: bool, offsets: Tensor, values: Tensor, t: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, opacity, depth and sums of the values.

    Args:
        absorbing: `[n_samples]`, density, or with `alphas` alpha.
        lengths, step: of the samples; without lengths `step`, and with alphas neither.
        alphas: what `absorbing` is.
        offsets, values, t: see `composite`.
    """
    absorbing, offsets, values, t = absorbing.contiguous(), offsets.contiguous(), values.contiguous(), t.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    weights, opacity, depth, sums = empty_outputs(absorbing, values, offsets)
    given = (pointer(absorbing), pointer(lengths), step, alphas, False)
    along = (pointer(offsets), opacity.shape[0], values.shape[0], pointer(values), values.shape[1], pointer(t))
    outputs = (pointer(weights), 0, pointer(opacity), pointer(depth), pointer(sums))
    call("composite_forward", absorbing, *given, *along, *outputs)
    return weights, opacity, depth, sums


def backward(
    absorbing: Tensor,
    lengths: Tensor | None,
    step: float,
    alphas: bool,
    offsets: Tensor,
    values: Tensor,
    t: Tensor,
    weights: Tensor,
    *given_grads: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `absorbing` and values from those of the four results of `forward`, None for zero."""
    absorbing, offsets, values, t = absorbing.contiguous(), offsets.contiguous(), values.contiguous(), t.contiguous()
    weights, lengths = weights.contiguous(), None if lengths is None else lengths.contiguous()
    grads = [None if grad is None else grad.contiguous() for grad in given_grads]
    of_weights, *of_sums = (pointer(grad) for grad in grads)
    grad_absorbing, grad_values = absorbing.new_zeros(absorbing.shape), values.new_zeros(values.shape)
    given = (pointer(absorbing), pointer(lengths), step, alphas, False)
    along = (pointer(offsets), offsets.shape[0] - 1, values.shape[0], pointer(values), values.shape[1], pointer(t))
    outputs = (pointer(grad_absorbing), pointer(grad_values))
    call("composite_backward", absorbing, *given, *along, pointer(weights), 0, of_weights, 0, *of_sums, *outputs)
    return grad_absorbing, grad_values


def weights_forward(
    absorbing: Tensor, lengths: Tensor | None, step: float, alphas: bool, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights, and the transmittance before each sample; arguments as of `forward`."""
    absorbing, offsets = absorbing.contiguous(), offsets.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    weights, transmittance = absorbing.new_zeros(absorbing.shape), absorbing.new_zeros(absorbing.shape)
    given = (pointer(absorbing), pointer(lengths), step, alphas, True)
    along = (pointer(offsets), offsets.shape[0] - 1, absorbing.shape[0], 0, 0, 0)
    call("composite_forward", absorbing, *given, *along, pointer(weights), pointer(transmittance), 0, 0, 0)
    return weights, transmittance


def weights_backward(
    absorbing: Tensor,
    lengths: Tensor | None,
    step: float,
    alphas: bool,
    offsets: Tensor,
    weights: Tensor,
    transmittance: Tensor,
    grad_weights: Tensor | None,
    grad_transmittance: Tensor | None,
) -> Tensor:
    """Gradient of `absorbing` from those of both results of `weights_forward`, None for zero."""
    absorbing, offsets = absorbing.contiguous(), offsets.contiguous()
    weights, transmittance = weights.contiguous(), transmittance.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    grads = [None if grad is None else grad.contiguous() for grad in (grad_weights, grad_transmittance)]
    grad_absorbing = absorbing.new_zeros(absorbing.shape)
    given = (pointer(absorbing), pointer(lengths), step, alphas, True)
    along = (pointer(offsets), offsets.shape[0] - 1, absorbing.shape[0], 0, 0, 0)
    found = (pointer(weights), pointer(transmittance), *(pointer(grad) for grad in grads), 0, 0, 0)
    call("composite_backward", absorbing, *given, *along, *found, pointer(grad_absorbing), 0)
    return grad_absorbing


def empty_outputs(absorbing: Tensor, values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of `forward`, to be filled."""
    n_rays = offsets.shape[0] - 1
    return (
        absorbing.new_zeros(absorbing.shape[0]),  # zeros for the samples of no ray
        absorbing.new_empty(n_rays),
        absorbing.new_empty(n_rays),
        absorbing.new_empty(n_rays, values.shape[1]),
    )


def by_ray(offsets: Tensor, *samples: Tensor) -> tuple[Tensor, ...]:
    """For twins: packed samples `[n_samples, ...]` as rows `[n_rays, longest, ...]`, zeros behind the last ones.

    First comes where the samples are, bool `[n_rays, longest]`.
    """
    counts = offsets.long().diff()
    longest = int(counts.max()) if counts.numel() > 0 else 0
    there = torch.arange(longest, device=offsets.device) < counts[:, None]
    n_used = int(offsets[-1])
    rows = []
    for packed in samples:
        shape = (*there.shape, *packed.shape[1:])
        rows.append(packed.new_zeros(shape).index_put((there.nonzero(as_tuple=True)), packed[:n_used]))
    return there, *rows


def transmittance_of_alpha(alpha: Tensor) -> Tensor:
    """For twins: of rows `[n_rays, longest]` what reaches each sample, differentiable at alpha = 1, too."""
    ones = alpha.new_ones(alpha.shape[0], 1)
    return torch.cat([ones, torch.cumprod(1 - alpha, dim=1)], dim=1)[:, : alpha.shape[1]]


def packed_again(there: Tensor, rows: Tensor, n_samples: int) -> Tensor:
    """For twins: the rows of `by_ray` as packed samples `[n_samples]`, zeros for those of no ray."""
    packed = rows[there]
    return torch.cat([packed, packed.new_zeros(n_samples - packed.shape[0])])
