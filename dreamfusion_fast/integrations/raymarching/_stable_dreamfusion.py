"""The functions of raymarching as stable-dreamfusion and its forks call them."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamfusion_fast.integrations.raymarching._samples import (
    Grid,
    composite_more,
    composite_packed,
    marched_rays,
    mark_in_order,
    noise_for,
)


@torch.no_grad()
def march_rays_train(
    rays_o: Tensor,
    rays_d: Tensor,
    bound: float,
    density_bitfield: Tensor,
    C: int,  # noqa: N803 - their name
    H: int,  # noqa: N803 - their name
    nears: Tensor,
    fars: Tensor,
    perturb: bool = False,
    dt_gamma: float = 0,
    max_steps: int = 1024,
    contract: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Samples along rays in occupied cells.

    Args:
        rays_o, rays_d: ``[N, 3]``, or ``[..., 3]`` of N rays together.
        bound: half the size of the scene's cube.
        density_bitfield: uint8 ``[C H^3 / 8]`` as `packbits` makes it.
        C, H: number of cascades, and cells of each along an axis.
        nears, fars: ``[N]``.
        perturb: put off each ray's first step by a random part of it (torch's generator).
        dt_gamma: how steps grow with the distance: ``dt = clamp(t dt_gamma, 2 sqrt(3) / max_steps,
            2 sqrt(3) bound / H)``.
        max_steps: the most samples of a ray, and what the shortest step follows.
        contract: draw positions beyond [-1, 1]^3 into [-2, 2]^3.

    Returns:
        ``xyzs [M, 3]``, where steps begin; ``dirs [M, 3]``; ``ts [M, 2]``, of each step the end and the length;
        ``rays`` int32 ``[N, 2]``, of each ray its first sample and their number, in order.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, or a bitfield of this package's `OccupancyGrid`.
    """
    rays = marched_rays("march_rays_train", rays_o, rays_d, nears, fars)
    grid = Grid(density_bitfield, bound, C, H, dt_gamma, max_steps, bound, contract)
    offsets, xyzs, ts, ray = grid.march(*rays, noise_for(rays[0], perturb))
    found = torch.stack([offsets[:-1], offsets.diff()], dim=1)
    return xyzs, rays[1][ray.long()], ts, mark_in_order(found)


def composite_rays_train(
    sigmas: Tensor,
    rgbs: Tensor,
    ts: Tensor,
    rays: Tensor,
    T_thresh: float = 1e-4,  # noqa: N803 - their name
    binarize: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Composites the samples of each ray front to back.

    Args:
        sigmas: ``[M]``, density per unit of t.
        rgbs: ``[M, 3]``.
        ts: ``[M, 2]``, of each sample the end and the length.
        rays: int32 ``[N, 2]``, first sample and their number. A ray that reaches beyond the samples counts as empty.
        T_thresh: a ray ends behind the sample that leaves less light than this.
        binarize: an alpha above one half counts as 1, any other as 0; the gradient is as if it were not.

    Returns:
        ``weights [M]``, ``weights_sum [N]``, ``depth [N]``, ``image [N, 3]``, float32, without a background. Exact
        gradients flow to sigmas and rgbs from all four.
    """
    sigmas, rgbs, ts = sigmas.float().reshape(-1), rgbs.float(), ts.detach().float()
    return composite_packed(sigmas, rgbs, ts[:, 0], ts[:, 1], rays, T_thresh, binarize)


@torch.no_grad()
def march_rays(
    n_alive: int,
    n_step: int,
    rays_alive: Tensor,
    rays_t: Tensor,
    rays_o: Tensor,
    rays_d: Tensor,
    bound: float,
    density_bitfield: Tensor,
    C: int,  # noqa: N803 - their name
    H: int,  # noqa: N803 - their name
    near: Tensor,
    far: Tensor,
    perturb: bool = False,
    dt_gamma: float = 0,
    max_steps: int = 1024,
    contract: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The next samples of the rays that are alive; without a wait for a GPU.

    Args:
        n_alive, n_step: number of rays and of samples for each.
        rays_alive: int32, the numbers of the rays; the first n_alive are read.
        rays_t: ``[N]``, where each ray goes on.
        near: ``[N]``; not read.
        far: ``[N]``.
        rays_o, rays_d, bound, density_bitfield, C, H, perturb, dt_gamma, max_steps, contract: see `march_rays_train`.

    Returns:
        ``xyzs``, ``dirs``, ``ts`` as from `march_rays_train`, of ``n_alive * n_step`` rows, zeros behind a ray's last.
    """
    ray = rays_alive[:n_alive].long()
    origins, directions, starts, ends = marched_rays("march_rays", rays_o, rays_d, rays_t, far)
    origins, directions, starts, ends = (x[ray] for x in (origins, directions, starts, ends))
    grid = Grid(density_bitfield, bound, C, H, dt_gamma, max_steps, bound, contract)
    return grid.march_rows(origins, directions, starts, ends, noise_for(ray, perturb), n_step)


def composite_rays(
    n_alive: int,
    n_step: int,
    rays_alive: Tensor,
    rays_t: Tensor,
    sigmas: Tensor,
    rgbs: Tensor,
    ts: Tensor,
    weights_sum: Tensor,
    depth: Tensor,
    image: Tensor,
    T_thresh: float = 1e-2,  # noqa: N803 - their name
    binarize: bool = False,
) -> tuple[()]:
    """Adds the samples of `march_rays` to the sums of their rays, in place; without a gradient.

    Args:
        n_alive, n_step: as given to `march_rays`.
        rays_alive: int32; a ray that has ended is -1 afterwards.
        rays_t: ``[N]``; moved to the end of the last sample of those that go on.
        sigmas, rgbs, ts: ``[n_alive * n_step, ...]``; a row whose length is 0 ends its ray.
        weights_sum, depth, image: ``[N]``, ``[N]``, ``[N, 3]``, what is added to.
        T_thresh: a ray ends with the first sample that less light than this reaches.
        binarize: see `composite_rays_train`.
    """
    sums = (weights_sum, depth, image)
    composite_more(n_alive, n_step, rays_alive, rays_t, sigmas, rgbs, ts[:, 0], ts[:, 1], *sums, T_thresh, binarize)
    return ()
