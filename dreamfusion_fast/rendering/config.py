"""Settings of the volume renderer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dreamfusion_fast.fields.base import Backend, check_backend


@dataclass(frozen=True)
class RendererConfig:
    """Settings of :class:`VolumeRenderer`."""

    samples_across: int = 512
    """Samples along the diagonal of the scene box, the first cascade's; the step is diagonal / samples_across."""
    step: float | None = None
    """Step in scene units; overrides samples_across."""
    cone_angle: float = 0.0
    """Growth of the step per distance, as a pixel's cone grows, for scenes with several cascades: a sample at distance
    t is max(step, min(t * cone_angle, max_step)) long. 0: all samples are as long. Needs near > 0; with an infinite
    far, a GPU is waited for once more per render."""
    max_step: float | None = None
    """Largest step with a cone_angle, scene units; None: no limit. Steps longer than an occupied part can miss it."""
    near: float = 0.0
    """Distance before which nothing is sampled."""
    far: float = math.inf
    """Distance beyond which nothing is sampled."""
    max_samples_per_chunk: int | None = None
    """Samples worked on at a time. None: for the built-in field what `memory_budget` holds, else 2^18 on a CPU and 2^20
    on a GPU, where a chunk has at least one whole ray."""
    early_stop: float = 0.0
    """Drop samples that less than this share of the light reaches, found by a density pass of its own; 0: keep all."""
    memory_budget: int | None = None
    """Bytes of workspace for a render of the built-in field; None: an eighth of what is free, at most 128 MB."""
    graphs: bool = True
    """Run small renders of the built-in field on a GPU as CUDA graphs once they repeat; see `rendering.volume.graphs`.
    Off: no memory is kept between renders."""
    backend: Backend = "native"
    """March and composite by the native core or by the pure-PyTorch twins (the field has a setting of its own)."""

    def __post_init__(self) -> None:
        if self.samples_across < 1:
            raise ValueError(f"RendererConfig.samples_across: got {self.samples_across}, want at least 1")
        if self.step is not None and not 0.0 < self.step < math.inf:
            raise ValueError(f"RendererConfig.step: got {self.step}, want above 0")
        if not 0.0 <= self.near < self.far:
            raise ValueError(f"RendererConfig.near, far: got {self.near}, {self.far}, want 0 <= near < far")
        if not 0.0 <= self.cone_angle < math.inf:
            raise ValueError(f"RendererConfig.cone_angle: got {self.cone_angle}, want at least 0")
        if self.cone_angle > 0.0 and self.near == 0.0:
            raise ValueError("RendererConfig.near: got 0.0, want above 0 with a cone_angle: steps grow from there")
        if self.max_step is not None and not (self.max_step > 0.0 and self.cone_angle > 0.0):
            raise ValueError(
                f"RendererConfig.max_step: got {self.max_step} with cone_angle {self.cone_angle}, want both above 0"
            )
        if self.max_samples_per_chunk is not None and self.max_samples_per_chunk < 1:
            raise ValueError(f"RendererConfig.max_samples_per_chunk: got {self.max_samples_per_chunk}, want at least 1")
        if self.memory_budget is not None and self.memory_budget < 1:
            raise ValueError(f"RendererConfig.memory_budget: got {self.memory_budget}, want at least 1 byte")
        if not 0.0 <= self.early_stop < 1.0:
            raise ValueError(f"RendererConfig.early_stop: got {self.early_stop}, want 0 to below 1")
        check_backend(self.backend)
