"""Alpha compositing of packed samples along rays (Max 1995; NeRF, Mildenhall et al. 2020, eq. 3)."""

from typing import Any

import torch
from torch import Tensor

from dreamfusion_fast.ops._checks import check_number, check_same_length, check_tensor, check_transforms, positive_in
from dreamfusion_fast.ops._native import call, pointer

# exp(-800) is zero in float32 and float64: a sample this thick is opaque, and an infinite density gives no inf - inf.
OPAQUE_DEPTH = 800.0


def composite(
    density: Tensor, values: Tensor, t: Tensor, step: float | Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Composites the samples of each ray front to back.

    Along one ray: ``alpha_i = 1 - exp(-density_i * step_i)``, transmittance
    ``T_i = exp(-sum_{j<i} density_j * step_j)``, weight ``w_i = T_i alpha_i``.

    Args:
        density: ``[n_samples]``, float32 or float64, per scene unit; +inf is an opaque sample. One below
            0 counts as 0 and gets no gradient.
        values: ``[n_samples, n_channels]``, same dtype, what is accumulated (colour, normals, ...); n_channels >= 1.
        t: ``[n_samples]``, same dtype, distance of each sample along its ray. It gets no gradient.
        step: length of a sample, in scene units: a number for all, or a tensor ``[n_samples]``, same dtype, with the
            length of each, as `march_lattice` returns them. Above 0. It gets no gradient.
        offsets: ``[n_rays + 1]`` int32, first sample of each ray and, last, where the last ray ends, as `march` returns
            it. Samples from there on, the unused rest of a larger buffer, get no weight and no gradient.

    Returns:
        ``weights [n_samples]`` (w), ``opacity [n_rays]`` (sum of w, at most 1), ``depth [n_rays]`` (sum of w t; divide
        by the opacity for a mean distance), ``accumulated [n_rays, n_channels]`` (sum of w values). A ray without
        samples gives zeros. Exact gradients flow to density and values from all four, once: there is no second
        derivative.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device, or a step that is not positive. Offsets
            that do not rise from 0 to at most n_samples, and lengths that are not positive, are found on the CPU only:
            on a GPU the check would wait.
        RuntimeError: the native core for this device was not built, or torch.func differentiates an argument.
    """
    _check("composite", density, values, t, step, offsets)
    check_transforms("composite", density, values)
    lengths, step = (step.detach(), 0.0) if isinstance(step, Tensor) else (None, step)
    return _composite(density, values, t.detach(), lengths, step, offsets)


def _check(op: str, density: Tensor, values: Tensor, t: Tensor, step: float | Tensor, offsets: Tensor) -> None:
    check_tensor(op, "density", density, ["n_samples"])
    check_tensor(op, "values", values, ["n_samples", "n_channels"], like=density, same_dtype=True)
    check_same_length(op, "values", values, "density", density)
    if values.shape[1] < 1:
        raise ValueError(f"{op}: values must have at least one channel, got {list(values.shape)}")
    check_tensor(op, "t", t, ["n_samples"], like=density, same_dtype=True)
    check_same_length(op, "t", t, "density", density)
    check_tensor(op, "offsets", offsets, ["n_rays + 1"], dtypes=[torch.int32], like=density)
    if offsets.shape[0] < 1:
        raise ValueError(f"{op}: offsets must have n_rays + 1 elements, got none")
    if isinstance(step, Tensor):
        check_tensor(op, "step", step, ["n_samples"], like=density, same_dtype=True)
        check_same_length(op, "step", step, "density", density)
    else:
        check_number(op, "step", step, "positive and finite", positive_in(density.dtype))


def _check_values(lengths: Tensor | None, offsets: Tensor, n_samples: int) -> None:
    """On the CPU alone, and inside the op, where tensors have values."""
    if offsets.device.type != "cpu":
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last > n_samples or bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError(
            "composite: offsets must rise from 0 to at most the number of samples: "
            f"there are {n_samples} samples, got offsets from {first} to {last}"
        )
    if lengths is None:
        return
    used = lengths[:last]
    if not bool(((used > 0) & used.isfinite()).all()):
        lowest, highest = (float(bound) for bound in used.aminmax())
        raise ValueError(f"composite: step must be positive and finite, got {lowest} to {highest}")


@torch.library.custom_op("dreamfusion_fast::composite", mutates_args=())
def _composite(
    density: Tensor, values: Tensor, t: Tensor, lengths: Tensor | None, step: float, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_values(lengths, offsets, density.shape[0])
    density, values, t, offsets = density.contiguous(), values.contiguous(), t.contiguous(), offsets.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    weights, opacity, depth, accumulated = _empty_outputs(density, values, offsets)
    inputs = (pointer(density), pointer(values), pointer(t), pointer(lengths), step, pointer(offsets))
    outputs = (pointer(weights), pointer(opacity), pointer(depth), pointer(accumulated))
    call("composite_forward", density, *inputs, *outputs, opacity.shape[0], *values.shape)
    return weights, opacity, depth, accumulated


def _empty_outputs(density: Tensor, values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n_rays = offsets.shape[0] - 1
    return (
        density.new_zeros(density.shape[0]),  # zeros for the samples of no ray
        density.new_empty(n_rays),
        density.new_empty(n_rays),
        density.new_empty(n_rays, values.shape[1]),
    )


@_composite.register_fake
def _(density: Tensor, values: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(density, values, others[-1])


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
    density, values, t, offsets = density.contiguous(), values.contiguous(), t.contiguous(), offsets.contiguous()
    weights, lengths = weights.contiguous(), None if lengths is None else lengths.contiguous()
    given = (grad_weights, grad_opacity, grad_depth, grad_accumulated)
    grads = [None if grad is None else grad.contiguous() for grad in given]
    grad_density, grad_values = density.new_zeros(density.shape), values.new_zeros(values.shape)
    tensors = (pointer(density), pointer(values), pointer(t), pointer(lengths))
    inputs = (*tensors, step, pointer(offsets), pointer(weights))
    outputs = (pointer(grad_density), pointer(grad_values))
    sizes = (offsets.shape[0] - 1, *values.shape)
    call("composite_backward", density, *inputs, *(pointer(grad) for grad in grads), *outputs, *sizes)
    return grad_density, grad_values


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


def composite_reference(
    density: Tensor, values: Tensor, t: Tensor, step: float | Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The PyTorch twin of `composite`: any float dtype, any device, differentiable any number of times."""
    n_rays, n_unused = offsets.shape[0] - 1, density.shape[0] - int(offsets[-1])
    starts = offsets.long()
    if n_unused > 0:
        density, values, t = density[:-n_unused], values[:-n_unused], t[:-n_unused]
        step = step[:-n_unused] if isinstance(step, Tensor) else step
    step = step if isinstance(step, Tensor) else float(step)  # torch multiplies by integers of 64 bits alone
    ray = torch.repeat_interleave(torch.arange(n_rays, device=density.device), starts.diff())
    optical = (density.clamp(min=0) * step).clamp(max=OPAQUE_DEPTH)
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
