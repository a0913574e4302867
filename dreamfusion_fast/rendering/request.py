"""What one render asks for and what comes back before backgrounds: the same for every way to render."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dreamfusion_fast.rendering.rays import Rays
from dreamfusion_fast.rendering.sample_total import SampleTotal
from dreamfusion_fast.rendering.shading import Shading


@dataclass(frozen=True)
class RenderRequest:
    """Checked arguments of :meth:`VolumeRenderer.render`; see there."""

    rays: Rays
    shading: Shading
    light: Tensor | None
    ambient: float
    diffuse: float
    normals: bool
    distortion: bool
    entropy: bool
    jitter: bool
    seed: int | Tensor
    counted: SampleTotal | None = None


@dataclass(frozen=True)
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
