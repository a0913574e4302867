"""Volume rendering of samples, packed or batched (Max 1995; NeRF, Mildenhall et al. 2020, eq. 3).

Packed samples are `[m]` and come with the ray of each (`ray_indices` int64 `[m]`, never falling, and `n_rays`) or with
`packed_info` int64 `[n_rays, 2]`, first sample and number of samples of each ray, without gaps. Batched samples are
`[..., n_samples]`, a row per ray, and come with neither. Values of 16 bits are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dreamfusion_fast.integrations.nerfacc import _lazy
from dreamfusion_fast.integrations.nerfacc._packing import known_offsets, offsets_for


def render_transmittance_from_alpha(
    alphas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    prefix_trans: Tensor | None = None,
) -> Tensor:
    """Light that reaches each sample: ``T_i = prod_{j<i} (1 - alpha_j)``.

    Args:
        alphas: `[m]` or `[..., n_samples]`, in [0, 1].
        packed_info, ray_indices, n_rays: see this module.
        prefix_trans: like `alphas`, what had reached the ray's first sample; 1 if None.

    Returns:
        T, like `alphas`. Gradients flow to `alphas`, once.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape.
    """
    op = "render_transmittance_from_alpha"
    _, trans, _ = _from_alpha(op, alphas, packed_info, ray_indices, n_rays)
    return trans if prefix_trans is None else trans * prefix_trans


def render_transmittance_from_density(
    t_starts: Tensor,
    t_ends: Tensor,
    sigmas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    prefix_trans: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Light that reaches each sample, ``T_i = exp(-sum_{j<i} sigma_j (t_end_j - t_start_j))``, and the samples' alphas.

    Args:
        t_starts, t_ends: `[m]` or `[..., n_samples]`, where each sample's interval begins and ends; it may be empty.
        sigmas: like them, density per scene unit; one below 0 absorbs nothing.
        packed_info, ray_indices, n_rays: see this module.
        prefix_trans: like `sigmas`, what had reached the ray's first sample; 1 if None.

    Returns:
        T, and ``alpha = 1 - exp(-sigma (t_end - t_start))``, like `sigmas`. Gradients flow to `sigmas`, and to
        `t_starts` and `t_ends`, once.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape.
    """
    op = "render_transmittance_from_density"
    _, trans, lengths = _from_density(op, t_starts, t_ends, sigmas, packed_info, ray_indices, n_rays)
    return trans if prefix_trans is None else trans * prefix_trans, _alphas(sigmas, lengths)


def render_weight_from_alpha(
    alphas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    prefix_trans: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Share of each sample in its ray's colour: ``w_i = T_i alpha_i``.

    Args:
        alphas, packed_info, ray_indices, n_rays, prefix_trans: see `render_transmittance_from_alpha`.

    Returns:
        w and T, like `alphas`. Gradients flow to `alphas`, once, and are finite at 0 and 1, too.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape.
    """
    weights, trans, _ = _from_alpha("render_weight_from_alpha", alphas, packed_info, ray_indices, n_rays)
    if prefix_trans is not None:
        weights, trans = weights * prefix_trans, trans * prefix_trans
    return weights, trans


def render_weight_from_density(
    t_starts: Tensor,
    t_ends: Tensor,
    sigmas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    prefix_trans: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Share of each sample in its ray's colour: ``w_i = T_i alpha_i``.

    Args:
        t_starts, t_ends, sigmas, packed_info, ray_indices, n_rays, prefix_trans: see
            `render_transmittance_from_density`.

    Returns:
        w, T and alpha, like `sigmas`. Gradients flow to `sigmas`, and to `t_starts` and `t_ends`, once.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape.
    """
    op = "render_weight_from_density"
    weights, trans, lengths = _from_density(op, t_starts, t_ends, sigmas, packed_info, ray_indices, n_rays)
    if prefix_trans is not None:
        weights, trans = weights * prefix_trans, trans * prefix_trans
    return weights, trans, _alphas(sigmas, lengths)


@torch.no_grad()
def render_visibility_from_alpha(
    alphas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    early_stop_eps: float = 1e-4,
    alpha_thre: float | Tensor = 0.0,
    prefix_trans: Tensor | None = None,
) -> Tensor:
    """Which samples matter: light reaches them, and they are not all but empty.

    Args:
        alphas, packed_info, ray_indices, n_rays, prefix_trans: see `render_transmittance_from_alpha`.
        early_stop_eps: least T of a sample that is kept.
        alpha_thre: least alpha of a sample that is kept; a number, or a tensor `[]` on the samples' device.

    Returns:
        bool, like `alphas`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape.
    """
    _, trans, alphas = _from_alpha("render_visibility_from_alpha", alphas, packed_info, ray_indices, n_rays)
    visible = (trans if prefix_trans is None else trans * prefix_trans) >= early_stop_eps
    if isinstance(alpha_thre, Tensor) or alpha_thre > 0:
        visible &= alphas >= alpha_thre
    return visible


@torch.no_grad()
def render_visibility_from_density(
    t_starts: Tensor,
    t_ends: Tensor,
    sigmas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    early_stop_eps: float = 1e-4,
    alpha_thre: float | Tensor = 0.0,
    prefix_trans: Tensor | None = None,
) -> Tensor:
    """Which samples matter: light reaches them, and they are not all but empty.

    Args:
        t_starts, t_ends, sigmas, packed_info, ray_indices, n_rays, prefix_trans: see
            `render_transmittance_from_density`.
        early_stop_eps, alpha_thre: see `render_visibility_from_alpha`.

    Returns:
        bool, like `sigmas`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape.
    """
    op = "render_visibility_from_density"
    _, trans, lengths = _from_density(op, t_starts, t_ends, sigmas, packed_info, ray_indices, n_rays)
    visible = (trans if prefix_trans is None else trans * prefix_trans) >= early_stop_eps
    if isinstance(alpha_thre, Tensor) or alpha_thre > 0:
        visible &= _alphas(sigmas, lengths) >= alpha_thre
    return visible


def accumulate_along_rays(
    weights: Tensor,
    values: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
) -> Tensor:
    """Weighted sum of the samples' values for each ray.

    Ray indices of `OccGridEstimator.sampling`, and those that were given to another function of this module before,
    are summed ray by ray, always in the same order; others may be in any order, and on a GPU their sums may be rounded
    in another order each time.

    Args:
        weights: `[m]` or `[..., n_samples]`.
        values: `[m, n_channels]` or `[..., n_samples, n_channels]`; None sums the weights themselves.
        ray_indices: int64 `[m]`, ray of each packed sample; None for batched samples.
        n_rays: number of rays, needed with `ray_indices`.

    Returns:
        `[n_rays, n_channels]` or `[..., n_channels]`, one channel without values. Gradients flow to both.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape.
    """
    op = "accumulate_along_rays"
    weighted = _weighted(op, weights, values, packed=ray_indices is not None)
    if ray_indices is None:
        return weighted.sum(dim=-2)
    _check_indices(op, ray_indices, weights)
    _lazy.check_number(op, "n_rays", n_rays, "the number of rays", lambda number: number >= 0, whole=True)
    assert n_rays is not None
    offsets = known_offsets(ray_indices, n_rays)
    if offsets is None:
        return weighted.new_zeros(n_rays, weighted.shape[1]).index_add(0, ray_indices, weighted)
    sums: Tensor = _RaySums.apply(weighted, ray_indices, offsets)
    return sums


def accumulate_along_rays_(
    weights: Tensor,
    values: Tensor | None = None,
    ray_indices: Tensor | None = None,
    outputs: Tensor | None = None,
) -> None:
    """Adds the weighted sum of the samples' values to `outputs`, in place.

    Args:
        weights, values, ray_indices: see `accumulate_along_rays`.
        outputs: `[n_rays, n_channels]`, or `[..., n_channels]` for batched samples; changed.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape.
    """
    op = "accumulate_along_rays_"
    weighted = _weighted(op, weights, values, packed=ray_indices is not None)
    if ray_indices is None:
        _lazy.check_tensor(op, "outputs", outputs, [*weighted.shape[:-2], weighted.shape[-1]], like=weighted)
        assert outputs is not None
        outputs.add_(weighted.sum(dim=-2))
        return
    _check_indices(op, ray_indices, weights)
    _lazy.check_tensor(op, "outputs", outputs, ["n_rays", weighted.shape[-1]], like=weighted)
    assert outputs is not None
    offsets = known_offsets(ray_indices, outputs.shape[0])
    if offsets is None:
        outputs.index_add_(0, ray_indices, weighted)
    else:
        outputs.add_(_RaySums.apply(weighted, ray_indices, offsets))


def rendering(
    t_starts: Tensor,
    t_ends: Tensor,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    rgb_sigma_fn: Callable[..., tuple[Tensor, Tensor]] | None = None,
    rgb_alpha_fn: Callable[..., tuple[Tensor, Tensor]] | None = None,
    render_bkgd: Tensor | None = None,
    expected_depths: bool = True,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Colour, opacity and depth of rays whose samples a function evaluates.

    Args:
        t_starts, t_ends: `[m]` or `[n_rays, n_samples]`.
        ray_indices, n_rays: see this module.
        rgb_sigma_fn: called with `t_starts, t_ends, ray_indices`, returns colours `[m, n_channels]` or
            `[n_rays, n_samples, n_channels]`, and densities like `t_starts`. Not called where there is no sample.
        rgb_alpha_fn: the same with alphas; one of both is needed.
        render_bkgd: colour behind the samples, `[n_channels]` or `[n_rays, n_channels]`; None is black.
        expected_depths: divide the depth by the opacity.

    Returns:
        colours `[n_rays, n_channels]`, opacities `[n_rays, 1]`, depths `[n_rays, 1]`, and a dict with ``weights``,
        ``trans``, ``alphas``, ``rgbs``, with densities ``sigmas``, too. Gradients flow through the function.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, or not exactly one function.
    """
    if (rgb_sigma_fn is None) == (rgb_alpha_fn is None):
        given = "neither" if rgb_sigma_fn is None else "both"
        raise ValueError(f"rendering: want one of rgb_sigma_fn and rgb_alpha_fn, got {given}")
    if ray_indices is not None and n_rays is None:
        raise ValueError("rendering: n_rays must be given with ray_indices")
    function = rgb_sigma_fn or rgb_alpha_fn
    assert function is not None
    if t_starts.numel() > 0:
        rgbs, opaqueness = function(t_starts, t_ends, ray_indices)
    else:
        rgbs, opaqueness = t_starts.new_empty(*t_starts.shape, 3), torch.empty_like(t_starts)
    if rgbs.shape[:-1] != t_starts.shape:
        raise ValueError(
            f"rendering: colours must have shape {[*t_starts.shape, 'n_channels']}, got {list(rgbs.shape)}"
        )
    extras: dict[str, Any] = {"rgbs": rgbs}
    if rgb_sigma_fn is not None:
        weights, trans, alphas = render_weight_from_density(
            t_starts, t_ends, opaqueness, ray_indices=ray_indices, n_rays=n_rays
        )
        extras["sigmas"] = opaqueness
    else:
        weights, trans = render_weight_from_alpha(opaqueness, ray_indices=ray_indices, n_rays=n_rays)
        alphas = opaqueness
    extras |= {"weights": weights, "trans": trans, "alphas": alphas}

    middles = 0.5 * (t_starts + t_ends)[..., None]
    colors = accumulate_along_rays(weights, rgbs, ray_indices, n_rays)
    opacities = accumulate_along_rays(weights, None, ray_indices, n_rays)
    depths = accumulate_along_rays(weights, middles, ray_indices, n_rays)
    if expected_depths:
        depths = depths / opacities.clamp_min(torch.finfo(opacities.dtype).eps)
    if render_bkgd is not None:
        colors = colors + render_bkgd * (1 - opacities)
    return colors, opacities, depths, extras


class _RaySums(torch.autograd.Function):
    """Sum of the rows of each ray: one thread per ray and channel, in the samples' order, where index_add is atomic."""

    @staticmethod
    def forward(ctx, rows, ray_indices, offsets):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(ray_indices)
        if rows.numel() == 0:
            return rows.new_zeros(offsets.shape[0] - 1, rows.shape[1])
        return torch.segment_reduce(rows.contiguous(), "sum", offsets=offsets, axis=0, initial=0, unsafe=True)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (ray_indices,) = ctx.saved_tensors
        return grad.index_select(0, ray_indices), None, None


def _weighted(op: str, weights: Tensor, values: Tensor | None, packed: bool) -> Tensor:
    """Rows that are summed, `[..., n_channels]`."""
    for name, tensor in (("weights", weights), ("values", values)):
        if not isinstance(tensor, Tensor) and not (name == "values" and tensor is None):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {_lazy.shown(tensor)}")
    if packed and weights.dim() != 1:
        raise ValueError(f"{op}: packed weights must have shape [n_samples], got {list(weights.shape)}")
    if weights.dim() == 0:
        raise ValueError(f"{op}: weights must have shape [..., n_samples], got a number")
    if values is None:
        return weights[..., None]
    if values.shape[:-1] != weights.shape:
        raise ValueError(f"{op}: values must have shape {[*weights.shape, 'n_channels']}, got {list(values.shape)}")
    return weights[..., None] * values


def _check_indices(op: str, ray_indices: Tensor, weights: Tensor) -> None:
    integers = (torch.int64, torch.int32)
    _lazy.check_tensor(op, "ray_indices", ray_indices, [weights.shape[0]], integers, like=weights)


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in a type that the ops take."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _from_alpha(
    op: str, alphas: Tensor, packed_info: Tensor | None, ray_indices: Tensor | None, n_rays: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, transmittance and alphas."""
    if not isinstance(alphas, Tensor):
        raise TypeError(f"{op}: alphas must be a torch.Tensor, got {_lazy.shown(alphas)}")
    offsets = offsets_for(op, alphas, packed_info, ray_indices, n_rays)
    alphas = _wide(alphas)
    weights, trans = _lazy.weights_from_alpha(alphas.reshape(-1), offsets)
    return weights.view(alphas.shape), trans.view(alphas.shape), alphas


def _from_density(
    op: str,
    t_starts: Tensor,
    t_ends: Tensor,
    sigmas: Tensor,
    packed_info: Tensor | None,
    ray_indices: Tensor | None,
    n_rays: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, transmittance and the intervals' lengths."""
    for name, tensor in (("t_starts", t_starts), ("t_ends", t_ends), ("sigmas", sigmas)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {_lazy.shown(tensor)}")
        if tensor.shape != sigmas.shape:
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, sigmas has {list(sigmas.shape)}")
    offsets = offsets_for(op, sigmas, packed_info, ray_indices, n_rays)
    density = _wide(sigmas)
    lengths = (t_ends - t_starts).to(density.dtype)
    step: Tensor | float = lengths.reshape(-1)
    if lengths.requires_grad:
        # The op has no gradient for lengths. With steps of 1, densities are optical depths.
        density, step = density * lengths, 1.0
    weights, trans = _lazy.weights_from_density(density.reshape(-1), step, offsets)
    return weights.view(sigmas.shape), trans.view(sigmas.shape), lengths


def _alphas(sigmas: Tensor, lengths: Tensor) -> Tensor:
    return -torch.expm1(sigmas * -lengths)
