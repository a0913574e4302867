"""The parts of a run's config that concern the loop alone; other parts of the package bring their own.

Fractions are of the whole run, so a run of other length keeps its shape.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.fields.encoded import shared_settings
from dreamfusion_fast.fields.hash_field import HashGridFieldConfig
from dreamfusion_fast.fields.triplane_field import TriplaneFieldConfig
from dreamfusion_fast.guidance.methods.dreamtime import DREAMTIME, time_of
from dreamfusion_fast.settings import Range, Settings
from dreamfusion_fast.training.config_io import ARCHITECTURE


@dataclass(frozen=True)
class Ramp(Settings):
    """A weight that goes linearly from `start` to `end` between two fractions of the run, constant outside."""

    start: Annotated[float, Range(0)] = 0.0
    end: Annotated[float, Range(0)] = 0.0
    begin: Annotated[float, Range(0, 1)] = 0.0
    until: Annotated[float, Range(0, 1)] = 1.0

    def check_together(self) -> None:
        if self.begin > self.until:
            self.refuse("begin", "until", want="begin <= until")

    def at(self, progress: float) -> float:
        """The weight at `progress`, the fraction of the run that is done."""
        if progress >= self.until:
            return self.end
        if progress <= self.begin:
            return self.start
        return self.start + (self.end - self.start) * (progress - self.begin) / (self.until - self.begin)


@dataclass(frozen=True)
class OptimConfig(Settings):
    """Adam, with one learning rate per kind of parameter, a linear warm-up and a cosine to `final_lr_factor`."""

    lr_table: Annotated[float, Range(0)] = 0.03
    """Learning rate of the hash table."""
    lr_planes: Annotated[float, Range(0)] = 0.015
    """Learning rate of a triplane's planes."""
    lr_mlp: Annotated[float, Range(0)] = 0.005
    """Learning rate of the field's networks."""
    lr_background: Annotated[float, Range(0)] = 0.001
    """Learning rate of the background."""
    betas: Annotated[tuple[float, float], Range(0, 1, open="high")] = (0.9, 0.99)
    """Decay of Adam's two moments."""
    eps: Annotated[float, Range(0, open="low")] = 1e-15
    """Adam's epsilon; small, since most rows of a hash table see tiny gradients."""
    warmup_steps: Annotated[int, Range(0)] = 50
    """Steps over which the learning rates rise from zero."""
    final_lr_factor: Annotated[float, Range(0, 1)] = 0.1
    """The learning rates at the end, as a fraction of the ones above."""


@dataclass(frozen=True)
class ShadingConfig(Settings):
    """Which shading a step renders with. DreamFusion, section 3.1."""

    albedo_steps: Annotated[float, Range(0, 1)] = 0.2
    """Fraction of the run, at its beginning, that renders albedo only."""
    albedo_probability: Annotated[float, Range(0, 1)] = 0.25
    """After that: probability of a step without shading."""
    textureless_probability: Annotated[float, Range(0, 1)] = 0.375
    """After that: probability of a step with shading on white. The rest is shaded albedo."""
    ambient: Annotated[float, Range(0)] = 0.3
    """Ambient light of shaded steps."""
    diffuse: Annotated[float, Range(0)] = 0.7
    """Diffuse light of shaded steps."""
    light_distance: Annotated[tuple[float, float], Range(0, open="low")] = (2.5, 4.0)
    """Range of the light's distance from the origin, scene units."""

    def check_together(self) -> None:
        if self.albedo_probability + self.textureless_probability > 1:
            self.refuse("albedo_probability", "textureless_probability", want="a sum of at most 1")
        if self.light_distance[0] > self.light_distance[1]:
            self.refuse("light_distance", want="the lower end first")


@dataclass(frozen=True)
class LossConfig(Settings):
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
class FirmConfig(Settings):
    """The last stage: the field is fitted to its own renders, with each pixel opaque or empty. See `training.firm`."""

    steps: Annotated[int, Range(0)] = 200
    """Optimiser steps, without the diffusion model; 0 leaves the field as score distillation made it."""
    lr_table: Annotated[float, Range(0)] = 0.01
    """Learning rate of the hash table; it falls to a tenth."""
    lr_planes: Annotated[float, Range(0)] = 0.01
    """Learning rate of a triplane's planes; it falls to a tenth."""
    lr_mlp: Annotated[float, Range(0)] = 0.002
    """Learning rate of the field's networks; it falls to a tenth."""
    join: Annotated[float, Range(0, 1)] = 0.15
    """Gap that is bridged between pieces of the object at most, share of the box's longest side; 0 joins nothing."""


@dataclass(frozen=True)
class OccupancyConfig(Settings):
    """The grid that tells the renderer which space is empty."""

    resolution: Annotated[int, Range(1, 1024)] = dataclasses.field(default=64, metadata=ARCHITECTURE)
    """Cells per side of the scene box."""
    every: Annotated[int, Range(1)] = 16
    """Steps between two updates."""
    warmup_steps: Annotated[int, Range(0)] = 96
    """Steps during which an update visits every cell."""
    decay: Annotated[float, Range(0, 1)] = 0.8
    """Decay of a cell's density per update."""
    alpha_threshold: Annotated[float, Range(0, 1, open="both")] = 0.01
    """A cell is empty below this opacity of one render step."""


@dataclass(frozen=True)
class BackgroundConfig(Settings):
    """The background behind the object: a plain colour per view, or a learned background around the scene."""

    plain: Annotated[float, Range(0, 1)] = 1.0
    """Probability that a step's views have plain backgrounds; the others show the learned one (DreamFusion: 0)."""
    white: Annotated[float, Range(0, 1)] = 0.4
    """Share of the plain backgrounds that are white; the others are random colours."""
    frequencies: Annotated[int, Range(1, 32)] = dataclasses.field(default=4, metadata=ARCHITECTURE)
    """Octaves of the learned background's direction encoding."""
    hidden: Annotated[int, Range(1, 4096)] = dataclasses.field(default=32, metadata=ARCHITECTURE)
    """Width of the learned background's network."""


@dataclass(frozen=True)
class ScheduleConfig(Settings):
    """Settings that change in the course of a run."""

    t_min: Annotated[float, Range(0, 1)] = 0.02
    """Smallest diffusion time."""
    t_max: Annotated[float, Range(0, 1)] = 0.98
    """Largest diffusion time at the beginning."""
    t_max_end: Annotated[float, Range(0, 1)] = 0.3
    """Largest diffusion time at the end; equal to t_max for no annealing (DreamFusion)."""
    t_anneal: Literal["linear", "sqrt", "dreamtime", "none"] = "linear"
    """How t_max goes to t_max_end: linear, sqrt (HiFA: fast at first), or none. dreamtime: timesteps fall from t_max to
    t_min, slowly where DreamTime's importance of them is large, and t_max_end is not read."""
    render_size_start: Annotated[int, Range(1, 4096)] = 32
    """Height and width rendered at the beginning, pixels; scaled up to what the guidance wants."""
    render_size: Annotated[int, Range(1, 4096)] = 64
    """Height and width rendered after `render_size_until`, pixels."""
    render_size_until: Annotated[float, Range(0, 1)] = 0.4
    """Fraction of the run rendered at render_size_start."""
    sds_share: Ramp = Ramp(1.0, 0.4, 0.3, 0.6)
    """Share of the guidance's mode, by default score distillation, in the pull; the rest is that of its second_mode, by
    default classifier score distillation, which shows more detail and firmer edges once there is an object."""
    t_draw: Literal["below", "exact"] = "below"
    """Timesteps are drawn between t_min and the annealed t_max (below), or are that (exact: HiFA, SDI, and always
    dreamtime)."""
    dreamtime: Annotated[tuple[float, float, float, float], Range(0, 1, open="low")] = DREAMTIME
    """DreamTime's m1, m2, s1, s2 as shares of the schedule: importance is 1 from m2 to m1 and falls off around as
    normal distributions of standard deviation s1 above and s2 below."""

    def check_together(self) -> None:
        if not self.t_min < self.t_max_end <= self.t_max:
            self.refuse("t_min", "t_max_end", "t_max", want="t_min < t_max_end <= t_max")
        if self.dreamtime[1] > self.dreamtime[0]:
            self.refuse("dreamtime", want="m2 <= m1 in m1, m2, s1, s2")

    def t_range(self, progress: float) -> tuple[float, float]:
        """Smallest and largest diffusion time at `progress`, the fraction of the run that is done."""
        fraction = min(max(progress, 0.0), 1.0)
        if self.t_anneal == "dreamtime":
            time = time_of(fraction, self.t_min, self.t_max, self.dreamtime)
            return time, time
        if self.t_anneal == "none":
            fraction = 0.0
        if self.t_anneal == "sqrt":
            fraction = fraction**0.5
        t_max = self.t_max + (self.t_max_end - self.t_max) * fraction
        return (t_max if self.t_draw == "exact" else self.t_min), t_max

    def size(self, progress: float) -> int:
        """Height and width to render at `progress`, pixels."""
        return self.render_size_start if progress < self.render_size_until else self.render_size


@dataclass(frozen=True)
class LogConfig(Settings):
    """The files and messages that a run writes on its way. A count of 0 turns the item off."""

    preview_every: Annotated[int, Range(0)] = 100
    """Steps between two refreshes of preview.png."""
    checkpoint_every: Annotated[int, Range(0)] = 250
    """Steps between two checkpoints; one is always written at the end and on Ctrl-C."""
    tensorboard: bool = True
    """Write TensorBoard scalars, and the previews, to RUN/tensorboard."""
    log_every: Annotated[int, Range(0)] = 10
    """Steps between two points of the curves."""
    progress_bar: bool = True
    """Show a progress bar."""
    progress_every: Annotated[float, Range(0)] = 0.0
    """Seconds between two writes of progress.json, for other programs to read; by default there is none."""


@dataclass(frozen=True)
class ExportConfig(Settings):
    """The mesh and the pictures made from a field."""

    resolution: Annotated[int, Range(8, 1024)] = 128
    """Marching cubes cells along the longest side of the scene box."""
    threshold: Annotated[float | None, Range(0, open="low")] = None
    """Density at the surface, per scene unit; by default the surface is the one that the renders show."""
    smooth_iterations: Annotated[int, Range(0, 1000)] = 5
    """Taubin smoothing steps; 0 leaves the marching cubes as they are."""
    min_component: Annotated[float, Range(0, 1)] = 0.005
    """Separate pieces smaller than this fraction of the largest are dropped."""
    target_faces: Annotated[int, Range(0)] = 20_000
    """Faces after decimation; 0 keeps all."""
    texture_size: Annotated[int, Range(16, 16384)] = 1024
    """Height and width of the texture, texels."""
    turntable_frames: Annotated[int, Range(0, 10_000)] = 60
    """Frames of turntable.mp4; 0 for no video."""
    turntable_size: Annotated[int, Range(16, 4096)] = 256
    """Height and width of the video, pixels."""
    turntable_fps: Annotated[int, Range(1, 1000)] = 24
    """Frames a second."""
    elevation_deg: Annotated[float, Range(-90, 90)] = 15.0
    """Camera elevation of the turntable and the preview, degrees."""
    preview_views: Annotated[int, Range(1, 64)] = 8
    """Views in preview.png."""


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

# A plane is a dense array: vertices beyond this are memory for what even guidance of 512 pixels hardly shows.
_MOST_PLANE_VERTICES = 256


def field_of_kind(
    kind: str, like: HashGridFieldConfig | TriplaneFieldConfig
) -> HashGridFieldConfig | TriplaneFieldConfig:
    """The settings of another kind of field for a run that has those of `like`: MLP, blob and bound stay as they are.

    A triplane has half as many vertices along a side as the hash grid's finest level cells, at most 256: with as many,
    planes learn each vertex from few samples and stay rough.

    Raises:
        UserError: there is no such kind.
    """
    if kind == like.kind:
        return like
    if kind == "triplane" and isinstance(like, HashGridFieldConfig):
        resolution = min(max(like.finest_resolution // 2, 3), _MOST_PLANE_VERTICES)
        return TriplaneFieldConfig(**shared_settings(like), resolution=resolution)
    if kind == "hash_grid":
        return HashGridFieldConfig(**shared_settings(like))
    raise UserError(f"--field: got {kind}, want hash_grid or triplane")
