"""From what a network says of samples to per-ray sums and back: the compositing of the streaming renderer.

The three native functions work in place on one tile of samples after another; `ray_sums_reference` is the same map of
all samples at once, in plain PyTorch. csrc/include/dreamfusion_fast/ray_sums.h has the equations with their sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreamfusion_fast.ops._native import call, pointer, strided
from dreamfusion_fast.ops.composite import OPAQUE_DEPTH, composite_reference
from dreamfusion_fast.ops.sample_head import SampleHead, sample_head_reference

# Columns of the sums; the constants of ray_sums.h.
OPTICAL_DEPTH = 0
COLOR = slice(1, 4)
DEPTH = 4
NORMAL = slice(5, 8)
ORIENTATION = 8
DISTORTION = 9
ENTROPY = 10
LOSSES = slice(8, 11)  # the three before
N_SUMS = 11  # channels follow
# What is kept for a cut between two tiles: optical depth and sum of w t in front of it.
N_PREFIX = 2

ENTROPY_EPS = 1e-5  # kEntropyEps


@dataclass(frozen=True, eq=False)
class SampleTile:
    """One window of the packed samples, `first <= i < first + capacity`. The last tile may have fewer.

    Attributes:
        offsets: int32 `[n_rays + 1]`, first sample of each ray.
        ray_range: int32 `[2]`, the rays that have samples in this tile: first, and one past the last.
        directions: `[n_rays, 3]`, contiguous.
        t: `[capacity]`, distances.
        lengths: `[capacity]`, or None: all `step`.
        positions: `[capacity, 3]`, in the scene box scaled to [0, 1]^3.
        logits: `[capacity, 4 + n_channels]`: density, albedo, others.
        slopes: `[capacity, 3]`, gradient of the density logit by `positions`; None: no normals.
        first: the first sample.
        step: length of a sample.
    """

    offsets: Tensor
    ray_range: Tensor
    directions: Tensor
    t: Tensor
    lengths: Tensor | None
    positions: Tensor
    logits: Tensor
    slopes: Tensor | None
    first: int
    step: float

    def arguments(self) -> tuple[Any, ...]:
        """As the native core takes it."""
        return (
            pointer(self.offsets),
            pointer(self.ray_range),
            pointer(self.directions),
            pointer(self.t),
            pointer(self.lengths),
            strided(self.positions),
            strided(self.logits),
            strided(self.slopes),
            self.offsets.shape[0] - 1,
            self.first,
            self.t.shape[0],
            self.step,
            self.logits.shape[1] - 4,
        )


def ray_sums_forward(
    head: SampleHead, tile: SampleTile, sums: Tensor, prefix: Tensor, distortion: bool, entropy: bool = True
) -> None:
    """Add a tile's samples to the sums. Tiles have to come in order.

    Args:
        head: what becomes of the network's outputs.
        tile: the samples.
        sums: `[n_rays, N_SUMS + n_channels]`, contiguous, zero before the first tile.
        prefix: `[N_PREFIX]`, written: what `ray_sums_backward` wants to know of the cut before this tile.
        distortion, entropy: whether to compute those columns.
    """
    arguments = (head.arguments, tile.arguments(), pointer(sums), pointer(prefix), distortion, entropy)
    call("ray_sums_forward", sums, *arguments)


def ray_sums_backward(
    head: SampleHead,
    tile: SampleTile,
    sums: Tensor,
    grad_sums: Tensor,
    prefix: Tensor,
    suffix_after: Tensor,
    suffix: Tensor,
    grad_logits: Tensor,
    grad_slopes: Tensor | None,
    distortion: bool,
    entropy: bool = True,
) -> None:
    """The gradient of a tile's samples. Tiles have to come in the opposite order.

    Args:
        head, tile, distortion, entropy: as in `ray_sums_forward`.
        sums: after the last tile.
        grad_sums: `[n_rays, N_SUMS + n_channels]`, contiguous.
        prefix: what `ray_sums_forward` wrote for this tile.
        suffix_after: `[1]`, the `suffix` of the tile after this one; of the last tile, anything.
        suffix: `[1]`, written.
        grad_logits: `[capacity, 4 + n_channels]`, written as far as there are samples.
        grad_slopes: `[capacity, 3]`, written likewise, or None without normals.
    """
    call(
        "ray_sums_backward",
        sums,
        head.arguments,
        tile.arguments(),
        pointer(sums),
        pointer(grad_sums),
        pointer(prefix),
        pointer(suffix_after),
        pointer(suffix),
        strided(grad_logits),
        strided(grad_slopes),
        distortion,
        entropy,
    )


def ray_sums_visible(
    head: SampleHead,
    tile: SampleTile,
    depths: Tensor,
    counts: Tensor,
    limit: float,
    least: float = 0.0,
    kept: Tensor | None = None,
) -> None:
    """Find, in the tiles' order, the samples in front of which the optical depth is at most `limit`, and which are of
    at least `least` themselves.

    Args:
        head, tile: as in `ray_sums_forward`; only the density is read.
        depths: `[n_rays]`, zero before the first tile: optical depth so far.
        counts: int32 `[n_rays]`, zero before the first tile: such samples so far; without `least` the first ones of
            their ray.
        limit: -log of the share of light below which a sample does not count.
        least: -log of the transparency above which a sample does not count.
        kept: uint8 `[all samples]`, written: whether each counts. None: nothing is.
    """
    outputs = (pointer(depths), pointer(counts), pointer(kept))
    call("ray_sums_visible", depths, head.arguments, tile.arguments(), *outputs, limit, least)


def ray_sums_reference(
    head: SampleHead,
    offsets: Tensor,
    directions: Tensor,
    t: Tensor,
    lengths: Tensor,
    positions: Tensor,
    logits: Tensor,
    slopes: Tensor | None,
    distortion: bool = True,
) -> Tensor:
    """The PyTorch twin of all tiles together: sums `[n_rays, N_SUMS + n_channels]`, differentiable to logits and
    slopes.

    Args:
        head: what becomes of the network's outputs.
        offsets: int32 `[n_rays + 1]`.
        directions: `[n_rays, 3]`.
        t, lengths: `[n_samples]`.
        positions, logits, slopes: as in `SampleTile`, of all samples.
        distortion: whether to compute that column; it compares all pairs of samples.
    """
    n_rays, n = offsets.shape[0] - 1, t.shape[0]
    ray = torch.repeat_interleave(torch.arange(n_rays, device=t.device), offsets.diff().long())
    light = head.light
    if light is not None and light.dim() == 2:
        light = light[ray]
    density, color, normal = sample_head_reference(head, positions, logits, slopes, light)
    tau = density * lengths
    values = torch.cat([color, normal, logits[:, 4:]], dim=1)
    # With densities in units of the samples' lengths, all samples are of length 1.
    w, _, depth, accumulated = composite_reference(tau, values, t, 1.0, offsets)
    clamped = w.clamp(ENTROPY_EPS, 1 - ENTROPY_EPS)
    away = (normal * directions[ray]).sum(dim=1).clamp(min=0)
    per_sample = {
        OPTICAL_DEPTH: tau,
        ORIENTATION: w.detach() * away.square(),
        ENTROPY: -(clamped * clamped.log() + (1 - clamped) * torch.log1p(-clamped)),
    }
    if distortion:
        same = ray[:, None] == ray
        pairs = (w[:, None] * w * (t[:, None] - t).abs() * same).sum(dim=1)
        per_sample[DISTORTION] = pairs + w.square() * lengths / 3
    sums = {name: tau.new_zeros(n_rays).index_add(0, ray, value) for name, value in per_sample.items()}
    zero = tau.new_zeros(n_rays)
    columns = [sums[OPTICAL_DEPTH], *accumulated[:, :3].T, depth, *accumulated[:, 3:6].T]
    columns += [sums[ORIENTATION], sums.get(DISTORTION, zero), sums[ENTROPY], *accumulated[:, 6:].T]
    assert n == ray.shape[0]
    return torch.stack(columns, dim=1)


# One twin for both passes over all tiles: autograd's gradient of it is what the tiles' backward writes.
ray_sums_forward_reference = ray_sums_backward_reference = ray_sums_reference


def ray_sums_visible_reference(
    head: SampleHead,
    offsets: Tensor,
    lengths: Tensor,
    positions: Tensor,
    logits: Tensor,
    limit: float,
    least: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The PyTorch twin of `ray_sums_visible` over all tiles: depths `[n_rays]`, counts int32 `[n_rays]`, kept uint8."""
    n_rays, starts = offsets.shape[0] - 1, offsets.long()
    ray = torch.repeat_interleave(torch.arange(n_rays, device=offsets.device), starts.diff())
    tau = sample_head_reference(head, positions, logits, None, None)[0] * lengths
    # In float64, because the sum over all rays outgrows the ray's own.
    optical = tau.double().clamp(max=OPAQUE_DEPTH)
    before = optical.cumsum(0) - optical
    visible = ~(before - before[starts[ray]] > limit) & ~(tau < least)
    counts = torch.zeros(n_rays, dtype=torch.int32, device=ray.device).index_add(0, ray, visible.int())
    return tau.new_zeros(n_rays).index_add(0, ray, tau), counts, visible.to(torch.uint8)
