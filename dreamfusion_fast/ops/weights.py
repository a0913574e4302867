"""Weights of packed samples along rays and the transmittance before each, for what `composite` does not add up."""

from typing import Any

import torch
from torch import Tensor

from dreamfusion_fast.ops._checks import check_tensor, check_transforms
from dreamfusion_fast.ops._composite import (
    by_ray,
    check_offsets,
    check_step,
    check_values,
    packed_again,
    plain_offsets,
    transmittance_of_alpha,
    weights_backward,
    weights_forward,
    widened,
)
from dreamfusion_fast.ops.composite import OPAQUE_DEPTH


def weights_from_density(density: Tensor, step: float | Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The weights that `composite` gives samples, and the light that reaches them.

    Along one ray: ``alpha_i = 1 - exp(-density_i * step_i)``, transmittance
    ``T_i = exp(-sum_{j<i} density_j * step_j)``, weight ``w_i = T_i alpha_i`` (NeRF, Mildenhall et al. 2020, eq. 3).
    Tensors of 16 bits are taken in float32, as by `composite`.

    Args:
        density: ``[n_samples]``, float32 or float64, per scene unit; +inf is an opaque sample. One below 0 counts as
            0 and gets no gradient.
        step: length of a sample, in scene units: a positive number for all, or a tensor ``[n_samples]``, same dtype,
            not below 0. It gets no gradient.
        offsets: ``[n_rays + 1]`` int32, or int64 that fits, first sample of each ray and, last, where the last ray
            ends.

    Returns:
        ``weights [n_samples]`` (w) and ``transmittance [n_samples]`` (T, before the sample); both 0 for samples of no
        ray. Exact gradients flow to density from both, once: there is no second derivative.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device, or a step that is not positive. Offsets
            that do not rise from 0 to at most n_samples, and lengths below 0 or not finite, are found on the CPU only:
            on a GPU the check would wait.
        RuntimeError: the native core for this device was not built, or torch.func differentiates an argument.
    """
    density, step = widened(density, step)
    offsets = plain_offsets(offsets)
    _check_density("weights_from_density", density, step, offsets)
    check_transforms("weights_from_density", density)
    lengths, step = (step.detach(), 0.0) if isinstance(step, Tensor) else (None, step)
    return _sample_weights(density, lengths, step, offsets, False)


def weights_from_alpha(alpha: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The weights that `composite_alpha` gives samples, and the light that reaches them.

    Along one ray: transmittance ``T_i = prod_{j<i} (1 - alpha_j)``, weight ``w_i = T_i alpha_i``.
    16 bits are taken in float32, as by `composite`.

    Args:
        alpha: ``[n_samples]``, float32 or float64, in [0, 1]. One below 0 counts as 0, one above 1 as 1, and neither
            gets a gradient; a NaN stays one.
        offsets: ``[n_rays + 1]`` int32, or int64 that fits, first sample of each ray and, last, where the last ray
            ends.

    Returns:
        As from `weights_from_density`. The gradients are exact at alpha = 0 and alpha = 1, too.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device. Offsets that do not rise from 0 to at
            most n_samples are found on the CPU only: on a GPU the check would wait.
        RuntimeError: the native core for this device was not built, or torch.func differentiates an argument.
    """
    (alpha,) = widened(alpha)
    offsets = plain_offsets(offsets)
    _check_alpha("weights_from_alpha", alpha, offsets)
    check_transforms("weights_from_alpha", alpha)
    return _sample_weights(alpha, None, 0.0, offsets, True)


def _check_density(op: str, density: Tensor, step: float | Tensor, offsets: Tensor) -> None:
    check_tensor(op, "density", density, ["n_samples"])
    check_offsets(op, offsets, density)
    check_step(op, step, density)


def _check_alpha(op: str, alpha: Tensor, offsets: Tensor) -> None:
    check_tensor(op, "alpha", alpha, ["n_samples"])
    check_offsets(op, offsets, alpha)


@torch.library.custom_op("dreamfusion_fast::sample_weights", mutates_args=())
def _sample_weights(
    absorbing: Tensor, lengths: Tensor | None, step: float, offsets: Tensor, alphas: bool
) -> tuple[Tensor, Tensor]:
    op = "weights_from_alpha" if alphas else "weights_from_density"
    check_values(op, lengths, offsets, absorbing.shape[0])
    return weights_forward(absorbing, lengths, step, alphas, offsets)


@_sample_weights.register_fake
def _(absorbing: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return absorbing.new_empty(absorbing.shape), absorbing.new_empty(absorbing.shape)


@torch.library.custom_op("dreamfusion_fast::sample_weights_backward", mutates_args=())
def _sample_weights_backward(
    absorbing: Tensor,
    lengths: Tensor | None,
    step: float,
    offsets: Tensor,
    alphas: bool,
    weights: Tensor,
    transmittance: Tensor,
    grad_weights: Tensor | None,
    grad_transmittance: Tensor | None,
) -> Tensor:
    found = (weights, transmittance, grad_weights, grad_transmittance)
    return weights_backward(absorbing, lengths, step, alphas, offsets, *found)


@_sample_weights_backward.register_fake
def _(absorbing: Tensor, *_: Any) -> Tensor:
    return absorbing.new_empty(absorbing.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    absorbing, lengths, step, offsets, alphas = inputs
    ctx.save_for_backward(absorbing, lengths, offsets, *output)
    ctx.step, ctx.alphas = step, alphas
    ctx.set_materialize_grads(False)  # an output that the loss does not read costs nothing


def _backward(ctx, *grads):  # type: ignore[no-untyped-def]
    if all(grad is None for grad in grads):
        return None, None, None, None, None
    absorbing, lengths, offsets, *outputs = ctx.saved_tensors
    grad = _sample_weights_backward(absorbing, lengths, ctx.step, offsets, ctx.alphas, *outputs, *grads)
    return grad, None, None, None, None


_sample_weights.register_autograd(_backward, setup_context=_setup_context)


def weights_from_density_reference(density: Tensor, step: float | Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The PyTorch twin of `weights_from_density`: any device, differentiable any number of times."""
    density, step = widened(density, step)
    offsets = plain_offsets(offsets)
    _check_density("weights_from_density_reference", density, step, offsets)
    dense = density.clamp(min=0)
    if isinstance(step, Tensor):  # over no length nothing is absorbed, whatever the density
        dense = torch.where(step == 0, 0.0, dense)
    else:
        step = float(step)  # a tensor takes no int beyond 64 bits
    there, optical = by_ray(offsets, (dense * step).clamp(max=OPAQUE_DEPTH))
    before = torch.nn.functional.pad(optical.cumsum(dim=1), (1, 0))[:, : optical.shape[1]]
    transmittance = torch.exp(-before)
    weights = transmittance * -torch.expm1(-optical)
    n = density.shape[0]
    return packed_again(there, weights, n), packed_again(there, transmittance, n)


def weights_from_alpha_reference(alpha: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The PyTorch twin of `weights_from_alpha`: any device, differentiable any number of times."""
    (alpha,) = widened(alpha)
    offsets = plain_offsets(offsets)
    _check_alpha("weights_from_alpha_reference", alpha, offsets)
    there, rows = by_ray(offsets, alpha.clamp(0, 1))
    transmittance = transmittance_of_alpha(rows)
    n = alpha.shape[0]
    return packed_again(there, transmittance * rows, n), packed_again(there, transmittance, n)
