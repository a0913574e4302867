"""Rendering any torch field, by autograd, in chunks of whole rays.

Rays are marched once, and only the distances and rays of the surviving samples are kept. Then, chunk by chunk:
positions -> field -> shading -> compositing. When the samples need more than one chunk, each is recomputed in backward,
so that at no time more than one chunk's activations exist. A render that hands out its samples keeps all of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamfusion_fast.fields.base import FieldLike, FieldOutput, evaluate, query_density, speaks_for_call
from dreamfusion_fast.fields.samples import FieldSamples, takes_samples
from dreamfusion_fast.ops.composite import composite, composite_alpha, composite_alpha_reference, composite_reference
from dreamfusion_fast.ops.march import (
    march,
    march_lattice,
    march_lattice_reference,
    march_reference,
    offset_reference,
)
from dreamfusion_fast.ops.tiles.ray_sums import ENTROPY_EPS
from dreamfusion_fast.ops.weights import (
    weights_from_alpha,
    weights_from_alpha_reference,
    weights_from_density,
    weights_from_density_reference,
)
from dreamfusion_fast.rendering.config import RendererConfig
from dreamfusion_fast.rendering.rays import Rays
from dreamfusion_fast.rendering.shading import shade
from dreamfusion_fast.rendering.volume.prepared import RaySamples, RenderOutput, RenderRequest
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
    """Samples of a run of whole rays: distances `[m]`, ray of each `[m]` (local), offsets int32 `[n + 1]` (local), the
    length of each `[m]`, or of all, and where each begins `[m]`; None: half of its length before its distance."""

    t: Tensor
    ray_indices: Tensor
    offsets: Tensor
    length: Tensor | float
    starts: Tensor | None = None

    @property
    def t_starts(self) -> Tensor:
        return self.t - 0.5 * self.length if self.starts is None else self.starts

    def pick(self, samples: slice | Tensor, first_ray: int, offsets: Tensor) -> _Packed:
        """Some of the samples, their rays counted from `first_ray` on."""
        length = self.length[samples] if isinstance(self.length, Tensor) else self.length
        starts = None if self.starts is None else self.starts[samples]
        return _Packed(self.t[samples], self.ray_indices[samples] - first_ray, offsets, length, starts)


@dataclass(frozen=True)
class _PerRay:
    """The inputs per ray, of some of the rays.

    Attributes:
        rays: `n` rays.
        light: `[3]`, `[n, 3]` or None.
        extras: `[n, ...]` each.
        first: number of the first ray in the render.
    """

    rays: Rays
    light: Tensor | None
    extras: Mapping[str, Tensor]
    first: int = 0

    def __getitem__(self, rows: slice) -> _PerRay:
        if rows.start == 0 and rows.stop >= len(self.rays):
            return self
        light = self.light[rows] if self.light is not None and self.light.dim() == 2 else self.light
        extras = {name: value[rows] for name, value in self.extras.items()}
        return _PerRay(self.rays[rows], light, extras, self.first + rows.start)

    def __len__(self) -> int:
        return len(self.rays)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All that gradients may be for."""
        return self.rays.origins, self.rays.directions, self.light, *self.extras.values()


@dataclass(frozen=True)
class ChunkedRender:
    """One render.

    Attributes:
        field: what is rendered, any callable from positions, or samples, to density and colour.
        config: settings.
        request: what is asked for.
        recompute: how more than one chunk goes through the field.
    """

    field: FieldLike
    config: RendererConfig
    request: RenderRequest
    recompute: Recomputation = dataclasses.field(default_factory=Recomputation)
    _widths: dict[str, int] = dataclasses.field(default_factory=dict)  # of the field's channels
    _samples: list[RaySamples] = dataclasses.field(default_factory=list)  # of each chunk, if they are asked for

    def output(self, space: SampledSpace) -> RenderOutput:
        """Render all rays."""
        request = self.request
        given = _PerRay(request.rays, request.light, request.extras)
        n_rays = len(given)
        parts, samples = [], 0
        by_method = self.config.prunes and self._method_speaks(given)
        for first in range(0, n_rays, RAYS_PER_MARCH) or (0,):
            rows = slice(first, first + RAYS_PER_MARCH)
            block = given[rows]
            packed = self._sample(space, rows, block.rays, int(request.seed) + first // RAYS_PER_MARCH)
            for chunk, chunk_packed in self._chunks(packed):
                part = block[chunk]
                if self.config.prunes:
                    chunk_packed = self._visible(part, chunk_packed, by_method)
                samples += chunk_packed.t.shape[0]
                parts.append(self._render(part, chunk_packed, keep=len(part) == n_rays))
        opacity, depth, accumulated, losses = (
            column[0] if len(column) == 1 else torch.cat(column) for column in zip(*parts, strict=True)
        )
        orientation, distortion, entropy = (losses.sum(dim=0) / max(n_rays, 1)).unbind()
        color, normal, *channels = accumulated.split([3, 3 * request.normals, *self._widths.values()], dim=1)
        return RenderOutput(
            color=color,
            opacity=opacity,
            depth=depth,
            normal=normal if request.normals else None,
            orientation_loss=orientation if request.normals else None,
            distortion_loss=distortion if request.distortion else None,
            sample_entropy_loss=entropy if request.entropy else None,
            samples=samples,
            channels=dict(zip(self._widths, channels, strict=True)),
            ray_samples=RaySamples.joined(self._samples) if request.return_samples else None,
        )

    @torch.no_grad()
    def _sample(self, space: SampledSpace, rows: slice, rays: Rays, seed: int) -> _Packed:
        """March some of the rays through the occupied cells."""
        native, jitter = self.config.backend == "native", self.request.jitter
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
            # The jitter moves all samples of a ray and their bounds with them: each stays in the middle of its own.
            equal = march if native else march_reference
            offsets, t, ray_indices = equal(*inputs, space.step, jitter, seed, cascades=space.cascades)
            return _Packed(t, ray_indices, offsets, space.step)
        growing = march_lattice if native else march_lattice_reference
        offsets, t, ray_indices, lengths = growing(*inputs, space.distances, jitter, seed, cascades=space.cascades)
        starts = None
        if jitter:  # which moves samples within bounds that are the same for all rays
            starts = t - offset_reference(inputs[0], jitter, seed)[ray_indices] * lengths
        return _Packed(t, ray_indices, offsets, lengths, starts)

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
    def _method_speaks(self, given: _PerRay) -> bool:
        """Whether the field's `density` method says which samples are visible.

        Not where a call returns opacities: such a field may have the method for an occupancy grid alone. That, it is
        asked with no samples.
        """
        if not speaks_for_call(self.field):
            return False
        none = given.rays.origins.new_zeros(0)
        index = none.to(torch.int32)
        packed = _Packed(none, index, index, none, none)
        samples = self._at(given.rays.origins, given.rays.directions, given.extras, packed, given.first)
        return evaluate(self.field, samples).alpha is None

    @torch.no_grad()
    def _visible(self, given: _PerRay, packed: _Packed, by_method: bool) -> _Packed:
        """Drop the samples that less than `early_stop` of the light reaches, or with less than `alpha_threshold` of
        opacity."""
        samples = self._at(given.rays.origins, given.rays.directions, given.extras, packed, given.first)
        output = None if by_method else evaluate(self.field, samples)
        if output is not None and output.alpha is not None:
            depth = -torch.log1p(-output.alpha.double().clamp(0.0, 1.0))
        else:
            density = query_density(self.field, samples.positions) if output is None else output.density
            assert density is not None
            depth = density.double().clamp(min=0.0) * packed.length
        ends = torch.cat([depth.new_zeros(1), depth.clamp(max=1e6).cumsum(0)])
        before = ends[:-1] - ends[packed.offsets.long()][packed.ray_indices.long()]
        # Not "at most": a NaN stays visible, so that it is seen.
        hidden = depth < -math.log1p(-self.config.alpha_threshold)
        if self.config.early_stop > 0.0:
            hidden |= before > -math.log(self.config.early_stop)
        kept = ~hidden
        kept_ends = torch.cat([kept.new_zeros(1, dtype=torch.int32), kept.cumsum(0, dtype=torch.int32)])
        return packed.pick(kept, 0, kept_ends[packed.offsets.long()])

    def _render(self, given: _PerRay, packed: _Packed, keep: bool) -> tuple[Tensor, ...]:
        """Opacity `[n]`, depth `[n]`, accumulated `[n, 3 or 6 + channels]`, losses over samples `[1, 3]`.

        Args:
            given: the chunk's `n` rays.
            packed: their samples.
            keep: whether to keep the activations for backward instead of recomputing them.
        """

        def run(origins: Tensor, directions: Tensor, light: Tensor | None, *extras: Tensor) -> tuple[Tensor, ...]:
            named = dict(zip(given.extras, extras, strict=True))
            samples = self._at(origins, directions, named, packed, given.first)
            return self._composite(samples, light, packed)

        if keep or self.request.return_samples or not torch.is_grad_enabled():
            return run(*given.tensors)  # type: ignore[arg-type]
        return self.recompute(run, given.tensors)

    def _composite(self, samples: FieldSamples, light: Tensor | None, packed: _Packed) -> tuple[Tensor, ...]:
        request, native = self.request, self.config.backend == "native"
        positions = samples.positions
        output = evaluate(self.field, samples, with_normal=request.normals)
        sample_light = light.index_select(0, packed.ray_indices) if light is not None and light.dim() == 2 else light
        color = shade(
            output.color, output.normal, positions, sample_light, request.shading, request.ambient, request.diffuse
        )
        normal = output.normal if request.normals else None
        self._check_channels(output)
        values = torch.cat([color, *([] if normal is None else [normal]), *output.channels.values()], dim=1)
        if output.density is not None:
            by_density = composite if native else composite_reference
            weights, opacity, depth, accumulated = by_density(
                output.density, values, packed.t, packed.length, packed.offsets
            )
        else:
            assert output.alpha is not None
            by_alpha = composite_alpha if native else composite_alpha_reference
            weights, opacity, depth, accumulated = by_alpha(output.alpha, values, packed.t, packed.offsets)
        losses = [opacity.new_zeros(())] * 3
        if normal is not None:
            away = (normal * samples.directions).sum(dim=1).clamp(min=0.0)
            losses[0] = (weights.detach() * away.square()).sum()
        if request.distortion:
            losses[1] = _distortion(weights, packed)
        if request.entropy:
            w = weights.clamp(ENTROPY_EPS, 1.0 - ENTROPY_EPS)
            losses[2] = -(w * w.log() + (1.0 - w) * torch.log1p(-w)).sum()
        if request.return_samples:
            self._samples.append(self._kept(samples, output, weights, packed))
        return opacity, depth, accumulated, torch.stack(losses)[None]

    def _at(
        self, origins: Tensor, directions: Tensor, extras: Mapping[str, Tensor], packed: _Packed, first: int
    ) -> FieldSamples:
        """Samples of these rays as the field gets them."""
        index = packed.ray_indices
        positions = torch.addcmul(origins.index_select(0, index), directions.index_select(0, index), packed.t[:, None])
        if not takes_samples(self.field):
            return FieldSamples(positions, directions, index, first_ray=first)
        starts = packed.t_starts
        return FieldSamples(positions, directions, index, (starts, starts + packed.length), extras, first)

    def _check_channels(self, output: FieldOutput) -> None:
        """The same channels in every chunk."""
        widths = {name: value.shape[1] for name, value in output.channels.items()}
        if not self._widths:
            self._widths.update(widths)
        if list(self._widths.items()) != list(widths.items()):
            raise ValueError(f"field: returned channels {widths}, and {self._widths} before, want the same each time")

    def _kept(self, samples: FieldSamples, output: FieldOutput, weights: Tensor, packed: _Packed) -> RaySamples:
        """The samples as a caller gets them."""
        native = self.config.backend == "native"
        if output.density is not None:
            density_weights = weights_from_density if native else weights_from_density_reference
            _, transmittance = density_weights(output.density, packed.length, packed.offsets)
        else:
            assert output.alpha is not None
            alpha_weights = weights_from_alpha if native else weights_from_alpha_reference
            _, transmittance = alpha_weights(output.alpha, packed.offsets)
        starts = packed.t_starts
        return RaySamples(
            offsets=packed.offsets,
            ray_indices=samples.ray_indices,
            t=packed.t,
            t_starts=starts,
            t_ends=starts + packed.length,
            positions=samples.positions,
            weights=weights,
            transmittance=transmittance,
            field=output,
        )


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
