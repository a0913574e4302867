"""A render from what it is made of to what comes back before backgrounds: the same for every way to render."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

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


@dataclass(frozen=True, kw_only=True)
class RaySums:
    """Sums over the samples of each ray, and over all rays for the losses.

    Attributes:
        color, normal: `[n_rays, 3]`; the normal is None if it was not asked for.
        opacity, depth: `[n_rays]`.
        orientation, distortion, entropy: 0-dim, summed over rays; None if not asked for.
        samples: how many were evaluated; in a CUDA graph a 0-dim tensor.
        overflowed: in a CUDA graph, bool 0-dim: more samples than the graph was captured for. Else None.
    """

    color: Tensor
    opacity: Tensor
    depth: Tensor
    normal: Tensor | None
    orientation: Tensor | None
    distortion: Tensor | None
    entropy: Tensor | None
    samples: int | Tensor
    overflowed: Tensor | None = None
