"""The compiled module `_raymarching` that the `raymarching` packages of stable-dreamfusion and torch-ngp call.

Its functions write into tensors that the caller made. Which project calls is told by the number of arguments, or by the
shape of `rays`. What stable-dreamfusion called before it had `binarize` is served, too, except for `composite_rays`,
which torch-ngp calls with as many.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dreamfusion_fast.integrations import raymarching
from dreamfusion_fast.integrations.raymarching import torch_ngp

__all__ = [
    "composite_rays",
    "composite_rays_train_backward",
    "composite_rays_train_forward",
    "flatten_rays",
    "march_rays",
    "march_rays_train",
    "morton3D",
    "morton3D_invert",
    "near_far_from_aabb",
    "packbits",
    "sph_from_ray",
]


def near_far_from_aabb(
    rays_o: Tensor, rays_d: Tensor, aabb: Tensor, n: int, min_near: float, nears: Tensor, fars: Tensor
) -> None:
    """Fills nears and fars ``[n]``."""
    for out, found in zip((nears, fars), raymarching.near_far_from_aabb(rays_o, rays_d, aabb, min_near), strict=True):
        out.copy_(found)


def sph_from_ray(rays_o: Tensor, rays_d: Tensor, radius: float, n: int, coords: Tensor) -> None:
    """Fills coords ``[n, 2]``."""
    coords.copy_(raymarching.sph_from_ray(rays_o, rays_d, radius))


def morton3D(coords: Tensor, n: int, indices: Tensor) -> None:  # noqa: N802 - their name
    """Fills indices ``[n]``."""
    indices.copy_(raymarching.morton3D(coords))


def morton3D_invert(indices: Tensor, n: int, coords: Tensor) -> None:  # noqa: N802 - their name
    """Fills coords ``[n, 3]``."""
    coords.copy_(raymarching.morton3D_invert(indices))


def packbits(grid: Tensor, n: int, density_thresh: float, bitfield: Tensor) -> None:
    """Fills bitfield ``[n]``."""
    raymarching.packbits(grid.reshape(1, -1), density_thresh, bitfield)


def flatten_rays(rays: Tensor, n: int, m: int, res: Tensor) -> None:
    """Fills res ``[m]``."""
    res.copy_(raymarching.flatten_rays(rays, m))


@torch.no_grad()
def march_rays_train(*arguments: Any) -> None:
    """Fills xyzs, dirs and ts or deltas, rays and the counter.

    Args:
        arguments: of stable-dreamfusion (rays_o, rays_d, grid, bound, contract, dt_gamma, max_steps, N, C, H, nears,
            fars, xyzs, dirs, ts, rays, counter, noises), where a first call with None for three of them only counts; of
            torch-ngp (rays_o, rays_d, grid, bound, dt_gamma, max_steps, N, C, H, M, nears, fars, xyzs, dirs, deltas,
            rays, counter, noises or perturb).
    """
    from dreamfusion_fast.integrations.raymarching._samples import Grid, marched_rays, noise_for
    from dreamfusion_fast.integrations.raymarching._torch_ngp import deltas_of

    _check_count("march_rays_train", arguments, 18)
    rays_o, rays_d, bits, bound, *numbers, nears, fars, xyzs, dirs, spans, rays, counter, noises = arguments
    taken = marched_rays("march_rays_train", rays_o, rays_d, nears, fars)
    noise = noise_for(taken[0], noises)
    if rays.shape[1] == 2:
        contract, dt_gamma, max_steps, n_rays, cascades, resolution = numbers
        grid = Grid(bits, bound, cascades, resolution, dt_gamma, max_steps, bound, contract)
        offsets, positions, found, ray = grid.march(*taken, noise)
        if xyzs is None:
            rays.copy_(torch.stack([offsets[:-1], offsets.diff()], dim=1))
            counter += offsets[-1]
            return
        samples = (positions, taken[1][ray.long()], found)
    else:
        dt_gamma, max_steps, n_rays, cascades, resolution, _ = numbers
        grid = Grid(bits, bound, cascades, resolution, dt_gamma, max_steps, 2.0 ** (cascades - 1))
        offsets, positions, found, ray = grid.march(*taken, noise)
        index = torch.arange(n_rays, dtype=torch.int32, device=offsets.device)
        rays.copy_(torch.stack([index, offsets[:-1], offsets.diff()], dim=1))
        counter += torch.stack([offsets[-1], torch.full_like(offsets[-1], n_rays)]).to(counter.dtype)
        deltas = deltas_of(found, offsets, ray, grid.start_of(taken[2], noise))
        samples = (positions, taken[1][ray.long()], deltas)
    for out, values in zip((xyzs, dirs, spans), samples, strict=True):
        room = min(out.shape[0], values.shape[0])
        out[:room] = values[:room].to(out.dtype)


@torch.no_grad()
def march_rays(*arguments: Any) -> None:
    """Fills xyzs, dirs and ts or deltas.

    Args:
        arguments: of stable-dreamfusion (n_alive, n_step, rays_alive, rays_t, rays_o, rays_d, bound, contract,
            dt_gamma, max_steps, C, H, grid, nears, fars, xyzs, dirs, ts, noises); of torch-ngp the same without
            contract, with deltas for ts, and noises or perturb.
    """
    _check_count("march_rays", arguments, 18, 19)
    *rays, nears, fars, xyzs, dirs, spans, noises = arguments
    n_alive, n_step, alive, rays_t, rays_o, rays_d, bound, *numbers = rays
    given = (n_alive, n_step, alive, rays_t, rays_o, rays_d, bound)
    if len(arguments) == 19:
        contract, dt_gamma, max_steps, cascades, resolution, bits = numbers
        options = (noises, dt_gamma, max_steps, contract)
        found = raymarching.march_rays(*given, bits, cascades, resolution, nears, fars, *options)
    else:
        dt_gamma, max_steps, cascades, resolution, bits = numbers
        options = (-1, noises, dt_gamma, max_steps)
        found = torch_ngp.march_rays(*given, bits, cascades, resolution, nears, fars, *options)
    for out, values in zip((xyzs, dirs, spans), found, strict=True):
        out[: values.shape[0]] = values.to(out.dtype)


@torch.no_grad()
def composite_rays_train_forward(*arguments: Any) -> None:
    """Fills weights, weights_sum, depth and image, of torch-ngp without weights.

    Args:
        arguments: of stable-dreamfusion (sigmas, rgbs, ts, rays, M, N, T_thresh, binarize, weights, weights_sum, depth,
            image), binarize may be missing; of torch-ngp (sigmas, rgbs, deltas, rays, M, N, T_thresh, weights_sum,
            depth, image), T_thresh may be missing.
    """
    _check_count("composite_rays_train_forward", arguments, 9, 10, 11, 12)
    sigmas, rgbs, spans, rays, _, _, *options = arguments
    found: tuple[Tensor, ...]
    if rays.shape[1] == 2:
        outputs, options = options[-4:], options[:-4]
        found = raymarching.composite_rays_train(sigmas, rgbs, spans, rays, *options)
    else:
        outputs, options = options[-3:], options[:-3]
        found = torch_ngp.composite_rays_train(sigmas, rgbs, spans, rays, *options)
    for out, values in zip(outputs, found, strict=True):
        out.copy_(values)


@torch.enable_grad()
def composite_rays_train_backward(*arguments: Any) -> None:
    """Fills grad_sigmas and grad_rgbs.

    Args:
        arguments: of stable-dreamfusion (grad_weights, grad_weights_sum, grad_depth, grad_image, sigmas, rgbs, ts,
            rays, weights_sum, depth, image, M, N, T_thresh, binarize, grad_sigmas, grad_rgbs), binarize may be missing;
            of torch-ngp (grad_weights_sum, grad_image, sigmas, rgbs, deltas, rays, weights_sum, image, M, N, T_thresh,
            grad_sigmas, grad_rgbs), T_thresh may be missing.
    """
    _check_count("composite_rays_train_backward", arguments, 12, 13, 16, 17)
    composite: Any
    if len(arguments) >= 16:
        grads, (sigmas, rgbs, spans, rays), options = arguments[:4], arguments[4:8], arguments[13:-2]
        composite = raymarching.composite_rays_train
    else:
        grads, (sigmas, rgbs, spans, rays), options = arguments[:2], arguments[2:6], arguments[10:-2]
        composite = torch_ngp.composite_rays_train
    inputs = [x.detach().requires_grad_() for x in (sigmas, rgbs)]
    outputs = composite(*inputs, spans, rays, *options)
    if len(grads) == 2:
        outputs = (outputs[0], outputs[2])
    found = torch.autograd.grad(outputs, inputs, [x.to(y.dtype) for x, y in zip(grads, outputs, strict=True)])
    for out, values in zip(arguments[-2:], found, strict=True):
        out.copy_(values)


def composite_rays(*arguments: Any) -> None:
    """Adds to weights_sum, depth and image, and moves rays_alive and rays_t.

    Args:
        arguments: of stable-dreamfusion (n_alive, n_step, T_thresh, binarize, rays_alive, rays_t, sigmas, rgbs, ts,
            weights_sum, depth, image); of torch-ngp the same without binarize, with deltas for ts, and T_thresh may be
            missing.
    """
    _check_count("composite_rays", arguments, 10, 11, 12)
    n_alive, n_step, *options = arguments[:-8]
    if len(arguments) == 12:
        raymarching.composite_rays(n_alive, n_step, *arguments[-8:], *options)
    else:
        torch_ngp.composite_rays(n_alive, n_step, *arguments[-8:], *options)


def _check_count(op: str, arguments: tuple[Any, ...], *counts: int) -> None:
    if len(arguments) not in counts:
        wanted = " or ".join(str(count) for count in counts)
        raise TypeError(f"{op}: arguments must be {wanted}, got {len(arguments)}")
