"""Alpha compositing of packed samples along rays (Max 1995; NeRF, Mildenhall et al. 2020, eq. 3)."""

from typing import Any

import torch
from torch import Tensor

from dreamfusion_fast.ops._checks import check_tensor, check_transforms
from dreamfusion_fast.ops._composite import (
    backward,
    by_ray,
    check_offsets,
    check_samples,
    check_step,
    check_values,
    empty_outputs,
    forward,
    packed_again,
    plain_offsets,
    transmittance_of_alpha,
    widened,
)

# exp(-800) is zero in float32 and float64: a sample this thick is opaque, and an infinite density gives no inf - inf.
OPAQUE_DEPTH = 800.0


def composite(
    density: Tensor, values: Tensor, t: Tensor, step: float | Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Composites the samples of each ray front to back.

    Along one ray: ``alpha_i = 1 - exp(-density_i * step_i)``, transmittance
    ``T_i = exp(-sum_{j<i} density_j * step_j)``, weight ``w_i = T_i alpha_i``.

    Tensors of 16 bits, as autocast makes them, are taken in float32, in which all results are then; their gradients are
    of 16 bits again.

    Args:
        density: ``[n_samples]``, float32 or float64, per scene unit; +inf is an opaque sample. One below
            0 counts as 0 and gets no gradient.
        values: ``[n_samples, n_channels]``, same dtype, what is accumulated (colour, normals, ...); n_channels >= 1.
        t: ``[n_samples]``, same dtype, distance of each sample along its ray. It gets no gradient.
        step: length of a sample, in scene units: a number for all, or a tensor ``[n_samples]``, same dtype, with the
            length of each, as `march_lattice` returns them. A number is above 0; a sample of length 0 has no weight
            and gets no gradient, whatever its density. The step gets no gradient.
        offsets: ``[n_rays + 1]`` int32, or int64 that fits, first sample of each ray and, last, where the last ray
            ends, as `march` returns it. Samples from there on, the unused rest of a larger buffer, get no weight and no
            gradient.

    Returns:
        ``weights [n_samples]`` (w), ``opacity [n_rays]`` (sum of w, at most 1), ``depth [n_rays]`` (sum of w t; divide
        by the opacity for a mean distance), ``accumulated [n_rays, n_channels]`` (sum of w values). A ray without
        samples gives zeros. Exact gradients flow to density and values from all four, once: there is no second
        derivative.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device, or a step that is not positive. Offsets
            that do not rise from 0 to at most n_samples, and lengths below 0 or not finite, are found on the CPU only:
            on a GPU the check would wait.
        RuntimeError: the native core for this device was not built, or torch.func differentiates an argument.
    """
    density, values, t, step = widened(density, values, t, step)
    offsets = plain_offsets(offsets)
    _check("composite", density, values, t, step, offsets)
    check_transforms("composite", density, values)
    lengths, step = (step.detach(), 0.0) if isinstance(step, Tensor) else (None, step)
    return _composite(density, values, t.detach(), lengths, step, offsets)


def composite_alpha(alpha: Tensor, values: Tensor, t: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Composites the samples of each ray front to back by their alphas.

    Along one ray: transmittance ``T_i = prod_{j<i} (1 - alpha_j)``, weight ``w_i = T_i alpha_i``. For surfaces whose
    alpha is no density times a length, as in NeuS (Wang et al. 2021, eq. 13). 16 bits are as in `composite`.

    Args:
        alpha: ``[n_samples]``, float32 or float64, what part of the light a sample absorbs, in [0, 1]. One below 0
            counts as 0, one above 1 as 1, and neither gets a gradient; a NaN stays one. At 0 and 1 themselves the
            gradient is that from within.
        values: ``[n_samples, n_channels]``, same dtype, what is accumulated (colour, normals, ...); n_channels >= 1.
        t: ``[n_samples]``, same dtype, distance of each sample along its ray. It gets no gradient.
        offsets: ``[n_rays + 1]``, see `composite`.

    Returns:
        ``weights [n_samples]``, ``opacity [n_rays]``, ``depth [n_rays]``, ``accumulated [n_rays, n_channels]``, as from
        `composite`. Exact gradients flow to alpha and values from all four, once: there is no second derivative.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device. Offsets that do not rise from 0 to at
            most n_samples are found on the CPU only: on a GPU the check would wait.
        RuntimeError: the native core for this device was not built, or torch.func differentiates an argument.
    """
    alpha, values, t = widened(alpha, values, t)
    offsets = plain_offsets(offsets)
    _check_alpha("composite_alpha", alpha, values, t, offsets)
    check_transforms("composite_alpha", alpha, values)
    return _composite_alpha(alpha, values, t.detach(), offsets)


def _check(op: str, density: Tensor, values: Tensor, t: Tensor, step: float | Tensor, offsets: Tensor) -> None:
    check_tensor(op, "density", density, ["n_samples"])
    check_samples(op, values, t, "density", density)
    check_offsets(op, offsets, density)
    check_step(op, step, density)


def _check_alpha(op: str, alpha: Tensor, values: Tensor, t: Tensor, offsets: Tensor) -> None:
    check_tensor(op, "alpha", alpha, ["n_samples"])
    check_samples(op, values, t, "alpha", alpha)
    check_offsets(op, offsets, alpha)


@torch.library.custom_op("dreamfusion_fast::composite", mutates_args=())
def _composite(
    density: Tensor, values: Tensor, t: Tensor, lengths: Tensor | None, step: float, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_values("composite", lengths, offsets, density.shape[0])
    return forward(density, lengths, step, False, offsets, values, t)


@_composite.register_fake
def _(density: Tensor, values: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_outputs(density, values, others[-1])


@torch.library.custom_op("dreamfusion_fast::composite_backward", mutates_args=())
def _composite_backward(
    density: Tensor,
    values: Tensor,
    t: Tensor,
    lengths: Tensor | None,
    step: float,
    offsets: Tensor,
    weights: Tensor,
    grad_weights: Tensor | None,
    grad_opacity: Tensor | None,
    grad_depth: Tensor | None,
    grad_accumulated: Tensor | None,
) -> tuple[Tensor, Tensor]:
    grads = (grad_weights, grad_opacity, grad_depth, grad_accumulated)
    return backward(density, lengths, step, False, offsets, values, t, weights, *grads)


@_composite_backward.register_fake
def _(density: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return density.new_empty(density.shape), values.new_empty(values.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    density, values, t, lengths, step, offsets = inputs
    ctx.save_for_backward(density, values, t, lengths, offsets, output[0])
    ctx.step = step
    ctx.set_materialize_grads(False)  # an output that the loss does not read costs nothing


def _backward(ctx, *grads):  # type: ignore[no-untyped-def]
    density, values, t, lengths, offsets, weights = ctx.saved_tensors
    if all(grad is None for grad in grads):
        return None, None, None, None, None, None
    grad_density, grad_values = _composite_backward(density, values, t, lengths, ctx.step, offsets, weights, *grads)
    return grad_density, grad_values, None, None, None, None


_composite.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("dreamfusion_fast::composite_alpha", mutates_args=())
def _composite_alpha(
    alpha: Tensor, values: Tensor, t: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_values("composite_alpha", None, offsets, alpha.shape[0])
    return forward(alpha, None, 0.0, True, offsets, values, t)


@_composite_alpha.register_fake
def _(alpha: Tensor, values: Tensor, t: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_outputs(alpha, values, offsets)


@torch.library.custom_op("dreamfusion_fast::composite_alpha_backward", mutates_args=())
def _composite_alpha_backward(
    alpha: Tensor,
    values: Tensor,
    t: Tensor,
    offsets: Tensor,
    weights: Tensor,
    grad_weights: Tensor | None,
    grad_opacity: Tensor | None,
    grad_depth: Tensor | None,
    grad_accumulated: Tensor | None,
) -> tuple[Tensor, Tensor]:
    grads = (grad_weights, grad_opacity, grad_depth, grad_accumulated)
    return backward(alpha, None, 0.0, True, offsets, values, t, weights, *grads)


@_composite_alpha_backward.register_fake
def _(alpha: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return alpha.new_empty(alpha.shape), values.new_empty(values.shape)


def _setup_alpha_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, output[0])
    ctx.set_materialize_grads(False)


def _alpha_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    if all(grad is None for grad in grads):
        return None, None, None, None
    grad_alpha, grad_values = _composite_alpha_backward(*ctx.saved_tensors, *grads)
    return grad_alpha, grad_values, None, None


_composite_alpha.register_autograd(_alpha_backward, setup_context=_setup_alpha_context)


def composite_reference(
    density: Tensor, values: Tensor, t: Tensor, step: float | Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The PyTorch twin of `composite`: any device, differentiable any number of times."""
    density, values, t, step = widened(density, values, t, step)
    n_rays, n_unused = offsets.shape[0] - 1, density.shape[0] - int(offsets[-1])
    starts = offsets.long()
    if n_unused > 0:
        density, values, t = density[:-n_unused], values[:-n_unused], t[:-n_unused]
        step = step[:-n_unused] if isinstance(step, Tensor) else step
    step = step if isinstance(step, Tensor) else float(step)  # torch multiplies by integers of 64 bits alone
    ray = torch.repeat_interleave(torch.arange(n_rays, device=density.device), starts.diff())
    density = density.clamp(min=0)
    if isinstance(step, Tensor):  # over no length nothing is absorbed, whatever the density
        density = torch.where(step == 0, 0.0, density)
    optical = (density * step).clamp(max=OPAQUE_DEPTH)
    # One running sum over all rays, less its value where the ray starts; in float64, because it outgrows the ray's own.
    inclusive = torch.cumsum(optical.double(), 0)
    before_ray = torch.cat([inclusive.new_zeros(1), inclusive])[starts[:-1]]
    before = (inclusive - optical.double() - before_ray[ray]).to(density.dtype)
    weights = torch.exp(-before) * -torch.expm1(-optical)
    opacity = weights.new_zeros(n_rays).index_add(0, ray, weights)
    depth = weights.new_zeros(n_rays).index_add(0, ray, weights * t)
    accumulated = values.new_zeros(n_rays, values.shape[1]).index_add(0, ray, weights.unsqueeze(1) * values)
    weights = torch.cat([weights, weights.new_zeros(n_unused)])
    return weights, opacity, depth, accumulated


def composite_alpha_reference(
    alpha: Tensor, values: Tensor, t: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The PyTorch twin of `composite_alpha`: any device, differentiable any number of times."""
    alpha, values, t = widened(alpha, values, t)
    offsets = plain_offsets(offsets)
    _check_alpha("composite_alpha_reference", alpha, values, t, offsets)
    there, rows, row_values, row_t = by_ray(offsets, alpha.clamp(0, 1), values, t)
    weights = transmittance_of_alpha(rows) * rows
    depth, accumulated = (weights * row_t).sum(dim=1), (weights[..., None] * row_values).sum(dim=1)
    return packed_again(there, weights, alpha.shape[0]), weights.sum(dim=1), depth, accumulated
