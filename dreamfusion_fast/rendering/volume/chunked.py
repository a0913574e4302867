"""Rendering any torch field, by autograd, in chunks of whole rays.

Rays are marched once, and only the distances and rays of the surviving samples are kept. Then, chunk by chunk:
positions -> field -> shading -> compositing. When the samples need more than one chunk, each is recomputed in backward,
so that at no time more than one chunk's activations exist.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamfusion_fast.fields.base import FieldLike, evaluate, query_density
from dreamfusion_fast.ops.composite import composite, composite_reference
from dreamfusion_fast.ops.march import march, march_lattice, march_lattice_reference, march_reference
from dreamfusion_fast.ops.tiles.ray_sums import ENTROPY_EPS
from dreamfusion_fast.rendering.config import RendererConfig
from dreamfusion_fast.rendering.rays import Rays
from dreamfusion_fast.rendering.shading import shade
from dreamfusion_fast.rendering.volume.prepared import RenderOutput, RenderRequest
from dreamfusion_fast.rendering.volume.recompute import Recomputation
from dreamfusion_fast.rendering.volume.sampling import SampledSpace

# Rays marched at a time. It bounds the distances held without gradients, keeps sample counts far from int32's limit,
# and is no setting, because jitter depends on it in images of more rays than this.
RAYS_PER_MARCH = 1 << 18
# Activations take 1.7 KB per sample, 3.5 KB with normals (bench_render.py, on a CPU): at most 0.9 GB a chunk on
# a CPU and 3.7 GB on a GPU, which leaves room on a 16 GB card.
_CHUNK_SAMPLES = {"cpu": 1 << 18, "cuda": 1 << 20}


@dataclass(frozen=True)
class _Packed:
    """Samples of a run of whole rays: distances `[m]`, ray of each `[m]` (local), offsets int32 `[n + 1]` (local), and
    the length of each `[m]`, or of all."""

    t: Tensor
    ray_indices: Tensor
    offsets: Tensor
    length: Tensor | float

    def pick(self, samples: slice | Tensor, first_ray: int, offsets: Tensor) -> _Packed:
        """Some of the samples, their rays counted from `first_ray` on."""
        length = self.length[samples] if isinstance(self.length, Tensor) else self.length
        return _Packed(self.t[samples], self.ray_indices[samples] - first_ray, offsets, length)


@dataclass(frozen=True)
class ChunkedRender:
    """One render.

    Attributes:
        field: what is rendered, any callable from positions to density and colour.
        config: settings.
        request: what is asked for.
        recompute: how more than one chunk goes through the field.
    """

    field: FieldLike
    config: RendererConfig
    request: RenderRequest
    recompute: Recomputation = dataclasses.field(default_factory=Recomputation)

    def output(self, space: SampledSpace) -> RenderOutput:
        """Render all rays."""
        request, rays = self.request, self.request.rays
        n_rays = len(rays)
        parts, samples = [], 0
        for first in range(0, n_rays, RAYS_PER_MARCH) or (0,):
            rows = slice(first, first + RAYS_PER_MARCH)
            block, block_light = rays[rows], _rows(request.light, rows)
            packed = self._sample(space, rows, block, int(request.seed) + first // RAYS_PER_MARCH)
            for chunk, chunk_packed in self._chunks(packed):
                whole = chunk.stop - chunk.start == len(block)
                chunk_rays = block if whole else block[chunk]
                if self.config.early_stop > 0.0:
                    chunk_packed = self._visible(chunk_rays, chunk_packed)
                samples += chunk_packed.t.shape[0]
                chunk_light = block_light if whole else _rows(block_light, chunk)
                keep = whole and len(block) == n_rays
                parts.append(self._render(chunk_rays, chunk_light, chunk_packed, keep))
        opacity, depth, accumulated, losses = (
            column[0] if len(column) == 1 else torch.cat(column) for column in zip(*parts, strict=True)
        )
        orientation, distortion, entropy = (losses.sum(dim=0) / max(n_rays, 1)).unbind()
        return RenderOutput(
            color=accumulated[:, :3],
            opacity=opacity,
            depth=depth,
            normal=accumulated[:, 3:] if request.normals else None,
            orientation_loss=orientation if request.normals else None,
            distortion_loss=distortion if request.distortion else None,
            sample_entropy_loss=entropy if request.entropy else None,
            samples=samples,
        )

    @torch.no_grad()
    def _sample(self, space: SampledSpace, rows: slice, rays: Rays, seed: int) -> _Packed:
        """March some of the rays through the occupied cells."""
        native, request = self.config.backend == "native", self.request
        inputs = (
            rays.origins.detach(),
            rays.directions.detach(),
            space.t_near[rows],
            space.t_far[rows],
            space.aabb,
            space.bitfield,
            space.resolution,
        )
        if space.distances is None:
            equal = march if native else march_reference
            offsets, t, ray_indices = equal(*inputs, space.step, request.jitter, seed, cascades=space.cascades)
            return _Packed(t, ray_indices, offsets, space.step)
        growing = march_lattice if native else march_lattice_reference
        offsets, t, ray_indices, lengths = growing(
            *inputs, space.distances, request.jitter, seed, cascades=space.cascades
        )
        return _Packed(t, ray_indices, offsets, lengths)

    def _chunks(self, packed: _Packed) -> Iterator[tuple[slice, _Packed]]:
        """Split into runs of whole rays, each within the budget or of one ray."""
        n_rays, total = packed.offsets.shape[0] - 1, packed.t.shape[0]
        budget = self.config.max_samples_per_chunk or _CHUNK_SAMPLES.get(packed.t.device.type, _CHUNK_SAMPLES["cuda"])
        if total <= budget:
            yield slice(0, n_rays), packed
            return
        offsets = packed.offsets.cpu()
        start = 0
        while start < n_rays:
            first = int(offsets[start])
            stop = int(torch.searchsorted(offsets, first + budget, right=True)) - 1
            stop = min(max(stop, start + 1), n_rays)
            last = int(offsets[stop])
            yield (
                slice(start, stop),
                packed.pick(slice(first, last), start, packed.offsets[start : stop + 1] - first),
            )
            start = stop

    @torch.no_grad()
    def _visible(self, rays: Rays, packed: _Packed) -> _Packed:
        """Drop the samples that less than `early_stop` of the light reaches."""
        depth = query_density(self.field, _positions(rays.origins, rays.directions, packed)).double() * packed.length
        ends = torch.cat([depth.new_zeros(1), depth.clamp(max=1e6).cumsum(0)])
        before = ends[:-1] - ends[packed.offsets.long()][packed.ray_indices.long()]
        kept = before <= -math.log(self.config.early_stop)
        kept_ends = torch.cat([kept.new_zeros(1, dtype=torch.int32), kept.cumsum(0, dtype=torch.int32)])
        return packed.pick(kept, 0, kept_ends[packed.offsets.long()])

    def _render(self, rays: Rays, light: Tensor | None, packed: _Packed, keep: bool) -> tuple[Tensor, ...]:
        """Opacity `[n]`, depth `[n]`, accumulated `[n, 3 or 6]`, losses over samples `[1, 3]`.

        Args:
            rays: the chunk's `n` rays.
            light: `[3]`, `[n, 3]` or None.
            packed: their samples.
            keep: whether to keep the activations for backward instead of recomputing them.
        """

        def run(origins: Tensor, directions: Tensor, light: Tensor | None) -> tuple[Tensor, ...]:
            return self._composite(origins, directions, light, packed)

        if keep or not torch.is_grad_enabled():
            return run(rays.origins, rays.directions, light)
        return self.recompute(run, (rays.origins, rays.directions, light))

    def _composite(
        self, origins: Tensor, directions: Tensor, light: Tensor | None, packed: _Packed
    ) -> tuple[Tensor, ...]:
        request = self.request
        positions = _positions(origins, directions, packed)
        output = evaluate(self.field, positions, with_normal=request.normals)
        sample_light = light.index_select(0, packed.ray_indices) if light is not None and light.dim() == 2 else light
        values = shade(
            output.albedo, output.normal, positions, sample_light, request.shading, request.ambient, request.diffuse
        )
        normal = output.normal if request.normals else None
        if normal is not None:
            values = torch.cat([values, normal], dim=1)
        function = composite if self.config.backend == "native" else composite_reference
        weights, opacity, depth, accumulated = function(output.density, values, packed.t, packed.length, packed.offsets)
        losses = [opacity.new_zeros(())] * 3
        if normal is not None:
            away = (normal * directions.index_select(0, packed.ray_indices)).sum(dim=1).clamp(min=0.0)
            losses[0] = (weights.detach() * away.square()).sum()
        if request.distortion:
            losses[1] = _distortion(weights, packed)
        if request.entropy:
            w = weights.clamp(ENTROPY_EPS, 1.0 - ENTROPY_EPS)
            losses[2] = -(w * w.log() + (1.0 - w) * torch.log1p(-w)).sum()
        return opacity, depth, accumulated, torch.stack(losses)[None]


def _distortion(weights: Tensor, packed: _Packed) -> Tensor:
    """sum_ij w_i w_j |t_i - t_j| + 1/3 sum w_i^2 length_i over the samples of each ray (mip-NeRF 360, equation 15).

    As samples come in order, the double sum is 2 sum_i w_i (t_i sum_{j<i} w_j - sum_{j<i} w_j t_j).
    """
    t = packed.t
    # In float64, as what is in front of a sample is a difference of two running sums over all rays.
    both = torch.stack([weights, weights * t]).double()
    running = torch.cat([both.new_zeros(2, 1), both.cumsum(dim=1)], dim=1)
    in_front = running[:, :-1] - running[:, packed.offsets.long()][:, packed.ray_indices.long()]
    pairs = 2.0 * (weights * (t * in_front[0] - in_front[1])).sum()
    return (pairs + (weights.square() * packed.length).sum() / 3.0).to(weights.dtype)


def _positions(origins: Tensor, directions: Tensor, packed: _Packed) -> Tensor:
    """Sample positions `[m, 3]`."""
    index = packed.ray_indices
    return torch.addcmul(origins.index_select(0, index), directions.index_select(0, index), packed.t[:, None])


def _rows(value: Tensor | None, rows: slice) -> Tensor | None:
    return value[rows] if value is not None and value.dim() == 2 else value
