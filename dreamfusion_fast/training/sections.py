"""The parts of a run's config that concern the loop alone; other parts of the package bring their own.

Fractions are of the whole run, so a run of other length keeps its shape.
"""

from __future__ import annotations

from dataclasses import dataclass

from dreamfusion_fast.fields.hash_field import HashGridFieldConfig


@dataclass(frozen=True)
class Ramp:
    """A weight that goes linearly from `start` to `end` between two fractions of the run, constant outside."""

    start: float = 0.0
    end: float = 0.0
    begin: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.until <= 1:
            raise ValueError(f"a ramp needs 0 <= begin <= until <= 1, not begin={self.begin}, until={self.until}")

    def at(self, progress: float) -> float:
        """The weight at `progress`, the fraction of the run that is done."""
        if progress >= self.until:
            return self.end
        if progress <= self.begin:
            return self.start
        return self.start + (self.end - self.start) * (progress - self.begin) / (self.until - self.begin)


@dataclass(frozen=True)
class OptimConfig:
    """Adam, with one learning rate per kind of parameter, a linear warm-up and a cosine to `final_lr_factor`."""

    lr_table: float = 0.03
    """Learning rate of the hash table."""
    lr_mlp: float = 0.005
    """Learning rate of the field's networks."""
    lr_background: float = 0.001
    """Learning rate of the background."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of Adam's two moments."""
    eps: float = 1e-15
    """Adam's epsilon; small, since most rows of a hash table see tiny gradients."""
    warmup_steps: int = 50
    """Steps over which the learning rates rise from zero."""
    final_lr_factor: float = 0.1
    """The learning rates at the end, as a fraction of the ones above."""


@dataclass(frozen=True)
class ShadingConfig:
    """Which shading a step renders with. DreamFusion, section 3.1."""

    albedo_steps: float = 0.2
    """Fraction of the run, at its beginning, that renders albedo only."""
    albedo_probability: float = 0.25
    """After that: probability of a step without shading."""
    textureless_probability: float = 0.375
    """After that: probability of a step with shading on white. The rest is shaded albedo."""
    ambient: float = 0.3
    """Ambient light of shaded steps."""
    diffuse: float = 0.7
    """Diffuse light of shaded steps."""
    light_distance: tuple[float, float] = (2.5, 4.0)
    """Range of the light's distance from the origin, scene units."""

    def __post_init__(self) -> None:
        total = self.albedo_probability + self.textureless_probability
        if min(self.albedo_probability, self.textureless_probability) < 0 or total > 1:
            raise ValueError(
                "albedo_probability and textureless_probability have to be at least 0 and sum to at most 1"
            )


@dataclass(frozen=True)
class LossConfig:
    """Weights of the regularisers beside the score distillation gradient, which has weight 1."""

    orientation: Ramp = Ramp(0.01, 0.1, 0.0, 0.5)
    """Normals of visible samples that point away from the camera (Ref-NeRF)."""
    opacity: Ramp = Ramp(0.0, 0.0)
    """sqrt(opacity^2 + 0.01) per ray: empty space stays empty. Off by default: it takes the legs of chairs."""
    ray_entropy: Ramp = Ramp(0.0, 0.0)
    """Binary entropy of the opacity per ray: a ray hits or it misses. Off by default, for the same reason."""
    sample_entropy: Ramp = Ramp(0.0, 0.003, 0.5, 0.9)
    """Binary entropy of the weight per sample: light is absorbed at one place, so that surfaces are hard."""
    distortion: Ramp = Ramp(0.0, 0.0)
    """Distance between the samples of a ray that have weight, scene units (mip-NeRF 360, eq. 15): one surface per ray.
    Off by default: 0.02 changed nothing that could be seen."""
    binary: Ramp = Ramp(0.0, 0.01, 0.6, 0.9)
    """Cross entropy of the opacity per ray with 1 where it is above the run's `opaque` thresholds, with 0 elsewhere."""


@dataclass(frozen=True)
class FirmConfig:
    """The last stage: the field is fitted to its own renders, with each pixel opaque or empty. See `training.firm`."""

    steps: int = 200
    """Optimiser steps, without the diffusion model; 0 leaves the field as score distillation made it."""
    lr_table: float = 0.01
    """Learning rate of the hash table; it falls to a tenth."""
    lr_mlp: float = 0.002
    """Learning rate of the field's networks; it falls to a tenth."""
    join: float = 0.15
    """Gap that is bridged between pieces of the object at most, share of the box's longest side; 0 joins nothing."""

    def __post_init__(self) -> None:
        if not 0 <= self.join <= 1:
            raise ValueError(f"join has to be between 0 and 1, not {self.join}")
        if self.steps < 0:
            raise ValueError(f"steps has to be at least 0, not {self.steps}")


@dataclass(frozen=True)
class OccupancyConfig:
    """The grid that tells the renderer which space is empty."""

    resolution: int = 64
    """Cells per side of the scene box."""
    every: int = 16
    """Steps between two updates."""
    warmup_steps: int = 96
    """Steps during which an update visits every cell."""
    decay: float = 0.8
    """Decay of a cell's density per update."""
    alpha_threshold: float = 0.01
    """A cell is empty below this opacity of one render step."""


@dataclass(frozen=True)
class BackgroundConfig:
    """The background behind the object: a plain colour per view, or a learned background around the scene."""

    plain: float = 1.0
    """Probability that a step's views have plain backgrounds; the others show the learned one (DreamFusion: 0)."""
    white: float = 0.4
    """Share of the plain backgrounds that are white; the others are random colours."""
    frequencies: int = 4
    """Octaves of the learned background's direction encoding."""
    hidden: int = 32
    """Width of the learned background's network."""

    def __post_init__(self) -> None:
        for name in ("plain", "white"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} has to be between 0 and 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class ScheduleConfig:
    """Settings that change in the course of a run."""

    t_min: float = 0.02
    """Smallest diffusion time."""
    t_max: float = 0.98
    """Largest diffusion time at the beginning."""
    t_max_end: float = 0.3
    """Largest diffusion time at the end; equal to t_max for no annealing (DreamFusion)."""
    t_anneal: str = "linear"
    """How t_max goes to t_max_end: linear, sqrt (HiFA: fast at first), or none."""
    render_size_start: int = 32
    """Height and width rendered at the beginning, pixels; scaled up to what the guidance wants."""
    render_size: int = 64
    """Height and width rendered after `render_size_until`, pixels."""
    render_size_until: float = 0.4
    """Fraction of the run rendered at render_size_start."""
    sds_share: Ramp = Ramp(1.0, 0.4, 0.3, 0.6)
    """Share of score distillation in the pull; the rest is classifier score distillation, which shows more detail and
    firmer edges once there is an object."""

    def __post_init__(self) -> None:
        if not 0 <= self.t_min < self.t_max_end <= self.t_max <= 1:
            raise ValueError(
                f"0 <= t_min < t_max_end <= t_max <= 1 has to hold, not t_min={self.t_min}, "
                f"t_max_end={self.t_max_end}, t_max={self.t_max}"
            )
        if self.t_anneal not in ("linear", "sqrt", "none"):
            raise ValueError(f"t_anneal has to be linear, sqrt or none, not {self.t_anneal!r}")

    def t_range(self, progress: float) -> tuple[float, float]:
        """Smallest and largest diffusion time at `progress`, the fraction of the run that is done."""
        if self.t_anneal == "none":
            return self.t_min, self.t_max
        fraction = min(max(progress, 0.0), 1.0)
        if self.t_anneal == "sqrt":
            fraction = fraction**0.5
        return self.t_min, self.t_max + (self.t_max_end - self.t_max) * fraction

    def size(self, progress: float) -> int:
        """Height and width to render at `progress`, pixels."""
        return self.render_size_start if progress < self.render_size_until else self.render_size


@dataclass(frozen=True)
class LogConfig:
    """The files and messages that a run writes on its way. A step count of 0 turns the item off."""

    preview_every: int = 100
    """Steps between two refreshes of preview.png."""
    checkpoint_every: int = 250
    """Steps between two checkpoints; one is always written at the end and on Ctrl-C."""
    tensorboard: bool = True
    """Write TensorBoard scalars to RUN/tensorboard."""
    log_every: int = 10
    """Steps between two points of the curves."""
    progress_bar: bool = True
    """Show a progress bar."""


@dataclass(frozen=True)
class ExportConfig:
    """The mesh and the pictures made from a field."""

    resolution: int = 128
    """Marching cubes cells along the longest side of the scene box."""
    threshold: float | None = None
    """Density at the surface, per scene unit; by default the surface is the one that the renders show."""
    smooth_iterations: int = 5
    """Taubin smoothing steps; 0 leaves the marching cubes as they are."""
    min_component: float = 0.005
    """Separate pieces smaller than this fraction of the largest are dropped."""
    target_faces: int = 20_000
    """Faces after decimation; 0 keeps all."""
    texture_size: int = 1024
    """Height and width of the texture, texels."""
    turntable_frames: int = 60
    """Frames of turntable.mp4; 0 for no video."""
    turntable_size: int = 256
    """Height and width of the video, pixels."""
    turntable_fps: int = 24
    """Frames a second."""
    elevation_deg: float = 15.0
    """Camera elevation of the turntable and the preview, degrees."""
    preview_views: int = 8
    """Views in preview.png."""

    def __post_init__(self) -> None:
        for name, least in (
            ("resolution", 8),
            ("smooth_iterations", 0),
            ("target_faces", 0),
            ("texture_size", 16),
            ("turntable_frames", 0),
            ("turntable_size", 16),
            ("turntable_fps", 1),
            ("preview_views", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} has to be at least {least}, not {getattr(self, name)}")
        if self.threshold is not None and self.threshold <= 0:
            raise ValueError(f"threshold has to be above 0, not {self.threshold}")
        if not 0 <= self.min_component <= 1:
            raise ValueError(f"min_component has to be between 0 and 1, not {self.min_component}")


# Guidance of 64 pixels shows nothing finer than 1/32 of the box, so a run's field and step stop at a quarter of that.
# The field's own defaults are for guidance of 512 pixels.
SMALL_FIELD = HashGridFieldConfig(
    levels=8,
    base_resolution=8,
    finest_resolution=128,
    log2_rows=16,
    hidden=32,
    blob_scale=5.0,
    blob_radius=0.75,
    mlp_dtype="auto",
)
