"""Settings of the volume renderer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from dreamfusion_fast.fields.base import Backend
from dreamfusion_fast.settings import Range, Settings


@dataclass(frozen=True)
class RendererConfig(Settings):
    """Settings of :class:`VolumeRenderer`."""

    samples_across: Annotated[int, Range(1, 2**20)] = 512
    """Samples along the diagonal of the scene box, the first cascade's; the step is diagonal / samples_across."""
    step: Annotated[float | None, Range(0, open="low")] = None
    """Step in scene units; overrides samples_across."""
    cone_angle: Annotated[float, Range(0)] = 0.0
    """Growth of the step per distance, as a pixel's cone grows, for scenes with several cascades: a sample at distance
    t is max(step, min(t * cone_angle, max_step)) long. 0: all samples are as long. With an infinite far, a GPU is
    waited for once more per render."""
    max_step: Annotated[float | None, Range(0, open="low")] = None
    """Largest step with a cone_angle, scene units; None: no limit. Steps longer than an occupied part can miss it."""
    near: Annotated[float, Range(0)] = 0.0
    """Distance before which nothing is sampled."""
    far: Annotated[float, Range(0, math.inf, open="low")] = math.inf
    """Distance beyond which nothing is sampled."""
    max_samples_per_chunk: Annotated[int | None, Range(1)] = None
    """Samples worked on at a time. None: for the built-in field what `memory_budget` holds, else 2^18 on a CPU and 2^20
    on a GPU, where a chunk has at least one whole ray."""
    early_stop: Annotated[float, Range(0, 1, open="high")] = 0.0
    """Drop samples that less than this share of the light reaches, found by a density pass of its own; 0: keep all."""
    alpha_threshold: Annotated[float, Range(0, 1, open="high")] = 0.0
    """Drop samples whose own opacity is below this, in the same pass as `early_stop` (nerfacc's `alpha_thre`): a haze
    of such samples is not rendered. 0: keep all."""
    memory_budget: Annotated[int | None, Range(1)] = None
    """Bytes of workspace for a render of the built-in field; None: an eighth of what is free, at most 128 MB."""
    graphs: bool = True
    """Run small renders of the built-in field on a GPU as CUDA graphs once they repeat; see `rendering.volume.graphs`.
    Off: no memory is kept between renders."""
    backend: Backend = "native"
    """March and composite by the native core or by the pure-PyTorch twins (the field has a setting of its own)."""

    def check_together(self) -> None:
        if self.near >= self.far:
            self.refuse("near", "far", want="near < far")
        if self.max_step is not None and self.cone_angle == 0.0:
            self.refuse("max_step", "cone_angle", want="both above 0")

    @property
    def prunes(self) -> bool:
        """Whether samples are dropped after a look at the density."""
        return self.early_stop > 0.0 or self.alpha_threshold > 0.0

    def step_of(self, box: Sequence[float]) -> float:
        """Distance between samples in a scene box (xmin, ymin, zmin, xmax, ymax, zmax), scene units; with a cone_angle,
        the least."""
        return self.step if self.step is not None else math.dist(box[:3], box[3:]) / self.samples_across
