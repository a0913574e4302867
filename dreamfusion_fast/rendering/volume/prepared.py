"""The input and the output of a render, the same for every way to render."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from dreamfusion_fast.fields.base import FieldOutput
from dreamfusion_fast.rendering.rays import Rays
from dreamfusion_fast.rendering.shading import Shading
from dreamfusion_fast.rendering.volume.sample_count import SampleCount


@dataclass(frozen=True, eq=False)
class PreparedRays:
    """The rays of a render to come; :meth:`VolumeRenderer.prepare` makes them.

    Attributes:
        rays, jitter, seed: as in :meth:`VolumeRenderer.render`.
        count: of the samples along the rays, if they were counted ahead.
        revision: of all that the count depends on.
    """

    rays: Rays
    jitter: bool
    seed: int | Tensor
    count: SampleCount | None = None
    revision: Hashable = None


@dataclass(frozen=True, kw_only=True)
class RenderRequest:
    """Checked arguments of :meth:`VolumeRenderer.render`; see there."""

    rays: Rays
    jitter: bool
    seed: int | Tensor
    count: SampleCount | None
    shading: Shading
    light: Tensor | None
    ambient: float
    diffuse: float
    normals: bool
    distortion: bool
    entropy: bool
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    return_samples: bool = False


@dataclass(frozen=True, eq=False)
class RaySamples:
    """The `m` samples of a render, in the order of the rays and along each.

    Positions, weights, transmittance and what the field said have gradients; offsets, indices and distances have none.

    Attributes:
        offsets: int32 `[n_rays + 1]`, first sample of each ray.
        ray_indices: int64 `[m]`, ray of each sample.
        t: `[m]`, distance at which the field was asked, scene units.
        t_starts, t_ends: `[m]`, where the sample begins and ends.
        positions: `[m, 3]`.
        weights: `[m]`, share of each sample in its ray's colour.
        transmittance: `[m]`, share of the light that reaches it.
        field: what the field said of them; its colour is unlit.
    """

    offsets: Tensor
    ray_indices: Tensor
    t: Tensor
    t_starts: Tensor
    t_ends: Tensor
    positions: Tensor
    weights: Tensor
    transmittance: Tensor
    field: FieldOutput

    @classmethod
    def joined(cls, parts: Sequence[RaySamples]) -> RaySamples:
        """Those of several runs of rays, one after the other."""
        if len(parts) == 1:
            return parts[0]
        samples = [0, *accumulate(part.t.shape[0] for part in parts)]
        per_sample = {
            name: torch.cat([getattr(part, name) for part in parts])
            for name in ("ray_indices", "t", "t_starts", "t_ends", "positions", "weights", "transmittance")
        }
        return cls(
            offsets=torch.cat(
                [parts[0].offsets, *(p.offsets[1:] + first for p, first in zip(parts[1:], samples[1:], strict=False))]
            ),
            field=_joined_fields([part.field for part in parts]),
            **per_sample,
        )


def _joined_fields(parts: Sequence[FieldOutput]) -> FieldOutput:
    def column(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if any(value is None for value in values) else torch.cat(values)

    return FieldOutput(
        column("density"),
        torch.cat([part.color for part in parts]),
        column("normal"),
        alpha=column("alpha"),
        channels={name: torch.cat([part.channels[name] for part in parts]) for name in parts[0].channels},
    )


@dataclass(frozen=True)
class RenderOutput:
    """The result of a render.

    Attributes:
        color: `[n_rays, 3]`, with the background in what :meth:`VolumeRenderer.render` returns.
        opacity: `[n_rays]`, sum of the weights.
        depth: `[n_rays]`, sum of weight * distance, scene units; `expected_depth` is that over the opacity.
        normal: `[n_rays, 3]`, sum of weight * normal, or None when no normals were computed.
        orientation_loss: 0-dim, mean over rays of sum sg(w) max(0, n . v)^2 (DreamFusion, appendix A.2; v the ray's
            direction), or None without normals.
        samples: how many samples were evaluated; in a CUDA graph a 0-dim int64 tensor.
        distortion_loss: 0-dim, mean over rays of sum_ij w_i w_j |t_i - t_j| + 1/3 sum w_i^2 length_i in scene units
            (mip-NeRF 360, equation 15), or None.
        sample_entropy_loss: 0-dim, mean over rays of the sum of the samples' binary entropies
            -w log w - (1 - w) log(1 - w), w clamped to [1e-5, 1 - 1e-5], or None.
        overflowed: in a CUDA graph of a streamed render, bool 0-dim: there were more samples than the graph was
            captured for, and everything else is NaN: capture again, and render again. None elsewhere.
        channels: what else the field returned, by name `[n_rays, c]`: sums of weight * value.
        ray_samples: the samples, if they were asked for, else None.
    """

    color: Tensor
    opacity: Tensor
    depth: Tensor
    normal: Tensor | None
    orientation_loss: Tensor | None
    samples: int | Tensor
    distortion_loss: Tensor | None = None
    sample_entropy_loss: Tensor | None = None
    overflowed: Tensor | None = None
    channels: Mapping[str, Tensor] = field(default_factory=dict)
    ray_samples: RaySamples | None = None

    def shaped(self, shape: Sequence[int]) -> RenderOutput:
        """What is per ray in the leading shape of the rays, `[*shape, ...]`; `ray_samples` stay a list."""

        def shaped(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.reshape((*shape, *value.shape[1:]))

        per_ray = {name: shaped(getattr(self, name)) for name in ("color", "opacity", "depth", "normal")}
        channels = {name: value.reshape(*shape, value.shape[1]) for name, value in self.channels.items()}
        return replace(self, channels=channels, **per_ray)  # type: ignore[arg-type]

    @property
    def expected_depth(self) -> Tensor:
        """Mean distance of what a ray sees, `[n_rays]`, scene units: depth / opacity; 0 where there is nothing."""
        least = torch.finfo(self.opacity.dtype).tiny
        return self.depth / self.opacity.clamp(min=least)
