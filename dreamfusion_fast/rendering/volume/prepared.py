"""The input and the output of a render, the same for every way to render."""

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


@dataclass(frozen=True)
class RenderOutput:
    """The result of a render.

    Attributes:
        color: `[n_rays, 3]`, with the background in what :meth:`VolumeRenderer.render` returns.
        opacity: `[n_rays]`, sum of the weights.
        depth: `[n_rays]`, sum of weight * distance (divide by opacity for the expected depth), scene units.
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
