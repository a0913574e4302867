"""The functions of raymarching as torch-ngp calls them."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamfusion_fast.integrations.raymarching._grid import samples_of
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
    step_counter: Tensor | None = None,
    mean_count: int = -1,
    perturb: bool = False,
    align: int = -1,
    force_all_rays: bool = False,
    dt_gamma: float = 0,
    max_steps: int = 1024,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Samples along rays in occupied cells.

    Args:
        rays_o, rays_d, bound, density_bitfield, C, H, nears, fars, perturb, max_steps: as stable-dreamfusion's.
        step_counter: int32 ``[2]``; the numbers of samples and of rays are added to it.
        mean_count: above 0, and without `force_all_rays`, the number of rows of the results: samples that do not fit
            are left out, and their rays count as empty when they are composited.
        align: above 0, the number of rows is raised to the next multiple of it, and from one multiple to the next.
        force_all_rays: make room for all samples whatever mean_count says.
        dt_gamma: ``dt = clamp(t dt_gamma, 2 sqrt(3) / max_steps, 2 sqrt(3) 2^(C-1) / H)``.

    Returns:
        ``xyzs [M, 3]``, ``dirs [M, 3]``, ``deltas [M, 2]``, zeros behind the last sample; ``rays`` int32 ``[N, 3]``,
        of each its number, its first sample and how many it has, in order.
    """
    rays = marched_rays("march_rays_train", rays_o, rays_d, nears, fars)
    grid = Grid(density_bitfield, bound, C, H, dt_gamma, max_steps, 2.0 ** (C - 1))
    noise = noise_for(rays[0], perturb)
    offsets, xyzs, spans, ray = grid.march(*rays, noise)
    n_rays, total = rays[0].shape[0], spans.shape[0]
    room = total
    if mean_count > 0 and not force_all_rays:
        room = mean_count
    if align > 0:
        room += align - room % align
    if step_counter is not None:
        step_counter += torch.tensor([total, n_rays], dtype=step_counter.dtype, device=step_counter.device)
    index = torch.arange(n_rays, dtype=torch.int32, device=offsets.device)
    found = torch.stack([index, offsets[:-1], offsets.diff()], dim=1)
    samples = (xyzs, rays[1][ray.long()], deltas_of(spans, offsets, ray, grid.start_of(rays[2], noise)))
    resized = (torch.nn.functional.pad(x, (0, 0, 0, room - total)) for x in samples)  # cut where there are more
    return (*resized, found if total > room else mark_in_order(found))  # type: ignore[return-value]


def deltas_of(spans: Tensor, offsets: Tensor, ray: Tensor, starts: Tensor) -> Tensor:
    """Of each sample its length, and the distance from the end of the one before, or from where the ray begins."""
    before = torch.nn.functional.pad(spans[:, 0], (1, 0))[:-1]
    first = torch.arange(spans.shape[0], device=spans.device) == offsets[ray.long()]
    return torch.stack([spans[:, 1], spans[:, 0] - torch.where(first, starts[ray.long()], before)], dim=1)


def composite_rays_train(
    sigmas: Tensor,
    rgbs: Tensor,
    deltas: Tensor,
    rays: Tensor,
    T_thresh: float = 1e-4,  # noqa: N803 - their name
) -> tuple[Tensor, Tensor, Tensor]:
    """Composites the samples of each ray front to back.

    Args:
        sigmas, rgbs, T_thresh: as stable-dreamfusion's.
        deltas: ``[M, 2]``, of each sample its length and the distance from the end of the one before.
        rays: int32 ``[N, 3]``: where a ray's results go, its first sample and how many it has.

    Returns:
        ``weights_sum [N]``, ``depth [N]``, ``image [N, 3]``, float32. Exact gradients flow to sigmas and rgbs from all
        three, from the depth, too.
    """
    sigmas, rgbs, deltas = sigmas.float().reshape(-1), rgbs.float(), deltas.detach().float()
    spans = rays[:, 1:]
    if getattr(rays, "in_order", False):
        spans = mark_in_order(spans)
    t = _along(deltas[:, 1], spans)
    sums = composite_packed(sigmas, rgbs, t, deltas[:, 0], spans, T_thresh, False)[1:]
    order = rays[:, 0].long()
    weights_sum, depth, image = (torch.zeros_like(x).index_copy(0, order, x) for x in sums)
    return weights_sum, depth, image


def _along(steps: Tensor, rays: Tensor) -> Tensor:
    """The sum of the steps of a ray up to each sample, this one included; in memory's order."""
    count = steps.shape[0]
    places, ray, offsets = samples_of(rays, count)
    read = places.clamp(max=max(count - 1, 0))
    sums = torch.nn.functional.pad(steps[read].double().cumsum(dim=0), (1, 0))
    along = (sums[1:] - sums[offsets.long()][ray]).to(steps.dtype)
    return along.new_zeros(count + 1).index_put((places,), along)[:count]


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
    align: int = -1,
    perturb: bool = False,
    dt_gamma: float = 0,
    max_steps: int = 1024,
) -> tuple[Tensor, Tensor, Tensor]:
    """The next samples of the rays that are alive; without a wait for a GPU.

    Args:
        n_alive, n_step, rays_alive, rays_t, rays_o, rays_d, bound, density_bitfield, C, H, near, far, perturb,
            max_steps: as stable-dreamfusion's.
        align, dt_gamma: see `march_rays_train`.

    Returns:
        ``xyzs``, ``dirs``, ``deltas`` of ``n_alive * n_step`` rows, raised by `align`, zeros where there is no sample.
    """
    ray = rays_alive[:n_alive].long()
    origins, directions, starts, ends = marched_rays("march_rays", rays_o, rays_d, rays_t, far)
    origins, directions, starts, ends = (x[ray] for x in (origins, directions, starts, ends))
    grid = Grid(density_bitfield, bound, C, H, dt_gamma, max_steps, 2.0 ** (C - 1))
    noise = noise_for(ray, perturb)
    xyzs, dirs, spans = grid.march_rows(origins, directions, starts, ends, noise, n_step)
    ends_of, lengths = spans.view(n_alive, n_step, 2).unbind(dim=-1)
    before = torch.cat([grid.start_of(starts, noise)[:, None], ends_of[:, :-1]], dim=1)
    deltas = torch.stack([lengths, torch.where(lengths > 0, ends_of - before, 0.0)], dim=-1).view(-1, 2)
    more = align - n_alive * n_step % align if align > 0 else 0
    xyzs, dirs, deltas = (torch.nn.functional.pad(x, (0, 0, 0, more)) for x in (xyzs, dirs, deltas))
    return xyzs, dirs, deltas


def composite_rays(
    n_alive: int,
    n_step: int,
    rays_alive: Tensor,
    rays_t: Tensor,
    sigmas: Tensor,
    rgbs: Tensor,
    deltas: Tensor,
    weights_sum: Tensor,
    depth: Tensor,
    image: Tensor,
    T_thresh: float = 1e-2,  # noqa: N803 - their name
) -> tuple[()]:
    """Adds the samples of `march_rays` to the sums of their rays, in place; without a gradient.

    Args:
        deltas: ``[n_alive * n_step, 2]`` as from `march_rays`, or longer.
        n_alive, n_step, rays_alive, rays_t, sigmas, rgbs, weights_sum, depth, image, T_thresh: as
            stable-dreamfusion's.
    """
    count = n_alive * n_step
    sigmas, rgbs, deltas = sigmas.reshape(-1)[:count], rgbs[:count], deltas[:count].detach().float()
    steps = deltas[:, 1].view(n_alive, n_step).cumsum(dim=1)
    t = rays_t[rays_alive[:n_alive].long().clamp(min=0)].float()[:, None] + steps
    sums = (weights_sum, depth, image)
    composite_more(n_alive, n_step, rays_alive, rays_t, sigmas, rgbs, t, deltas[:, 0], *sums, T_thresh, False)
    return ()
