"""The interface between a trainer and a diffusion model: images, views, prompt embeddings, and a gradient.

`Guidance` is what a trainer sees. `DiffusionModel` is what a diffusion model has to say about itself for
`dreamfusion_fast.guidance.distillation.ScoreDistillation`, the one implementation of `Guidance`, to use it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dreamfusion_fast.guidance.memory import BatchPart, GuidanceMemory
from dreamfusion_fast.guidance.models.schedule import NoiseSchedule
from dreamfusion_fast.guidance.prompts import VIEW_NAMES, Prompt, PromptSet, view_index

ShadingName = Literal["albedo", "lambertian", "textureless"]

T_RANGE = (0.02, 0.98)
"""Fractions of a noise schedule between which timesteps are drawn by default, as in DreamFusion."""


@dataclass(frozen=True)
class Views:
    """How a batch of images was made: what view-dependent prompts and camera-conditioned models read.

    Args:
        azimuth: [B] radians, 0 is the front, positive towards +X.
        elevation: [B] radians above the horizon.
        background: [B, 3] solid colour behind the object in [0, 1], or None where it is not one colour.
        shading: shading of the whole batch.
    """

    azimuth: Tensor
    elevation: Tensor
    background: Tensor | None = None
    shading: ShadingName = "albedo"

    def __post_init__(self) -> None:
        if self.azimuth.ndim != 1 or self.azimuth.shape != self.elevation.shape:
            raise ValueError(
                "azimuth and elevation must both have shape [B], "
                f"got {tuple(self.azimuth.shape)} and {tuple(self.elevation.shape)}"
            )
        if self.background is not None and self.background.shape != (len(self), 3):
            raise ValueError(f"background must have shape [{len(self)}, 3], got {tuple(self.background.shape)}")
        if self.shading not in get_args(ShadingName):
            raise ValueError(f"shading must be one of {', '.join(get_args(ShadingName))}, got {self.shading!r}")

    def __len__(self) -> int:
        return self.azimuth.shape[0]

    def __getitem__(self, rows: slice) -> Views:
        """Some of the views."""
        background = None if self.background is None else self.background[rows]
        return Views(self.azimuth[rows], self.elevation[rows], background, self.shading)

    def to(self, device: torch.device | str) -> Views:
        background = None if self.background is None else self.background.to(device)
        return Views(self.azimuth.to(device), self.elevation.to(device), background, self.shading)


@dataclass(frozen=True)
class PromptEmbeddings:
    """Embedded prompts, one row per direction of `VIEW_NAMES` and the unconditional text last.

    Args:
        tensors: name -> [5, ...]. The names belong to the model ("hidden" for the sequence, and what else it needs).
    """

    tensors: Mapping[str, Tensor]

    ROWS = len(VIEW_NAMES) + 1

    def __post_init__(self) -> None:
        if not self.tensors:
            raise ValueError("tensors must hold at least one named tensor")
        for name, value in self.tensors.items():
            if value.ndim < 2 or value.shape[0] != self.ROWS:
                raise ValueError(f"tensors[{name!r}] must have shape [{self.ROWS}, ...], got {tuple(value.shape)}")

    def to(self, device: torch.device | str) -> PromptEmbeddings:
        return PromptEmbeddings({name: value.to(device) for name, value in self.tensors.items()})

    def select(self, conditions: Sequence[str], views: Views) -> dict[str, Tensor]:
        """Rows for each view under each condition, on the embeddings' device and without waiting for it.

        Args:
            conditions: "null" for the unconditional row, "text" for that of each view's direction, or one of
                `VIEW_NAMES` for that direction's.
            views: B of them.

        Returns:
            name -> [K B, ...]: B rows of the first condition, then B of the second, and so on.
        """
        text = view_index(views.azimuth, views.elevation)
        fixed = {"null": len(VIEW_NAMES), **{name: row for row, name in enumerate(VIEW_NAMES)}}
        rows = torch.cat([text if name == "text" else torch.full_like(text, fixed[name]) for name in conditions])
        return {name: value.index_select(0, rows.to(value.device)) for name, value in self.tensors.items()}


class SDSOutput(NamedTuple):
    """The result of one guidance step; everything is detached and on the device of the images.

    Attributes:
        gradient: [B, 3, H, W], dtype of the images: the gradient with respect to the images in [0, 1] of the objective
            sum over views of <stop_gradient(w(t) (eps_hat - eps)), x>, where x is the model's input for the image.
            It is summed over views, channels and pixels, and divided by nothing.
        t: [B] int64, timestep of each view.
        norm: [B] Euclidean norm of each view's gradient.
        residual: [B] root mean square of eps_hat - eps over the model's input.
        x0: [B, C, h, w] the model's estimate of the clean input, after clamping if that is on.
    """

    gradient: Tensor
    t: Tensor
    norm: Tensor
    residual: Tensor
    x0: Tensor


class UsesMemory:
    """Memory needs of a model and of the guidance around it, and ways to need less. The defaults do nothing.

    `dreamfusion_fast.training.memory_plan` asks.
    """

    def memory_needs(self, batch: int, render_size: int) -> GuidanceMemory:
        """Needs of one call with `batch` views of `render_size` pixels a side. What is per view may depend on both."""
        return GuidanceMemory()

    def set_recompute(self, on: bool) -> None:
        """Let the encoding keep less for its backward, and compute it again. Results stay the same up to rounding.

        Asked of those whose `memory_needs` say that it saves something.
        """
        return  # nothing to do by default

    def set_offload(self, on: bool) -> None:
        """Keep weights in main memory while they are not in use. Asked of those whose `memory_needs` have any."""
        return  # nothing to do by default

    def free_graphs(self) -> None:
        """Give up captured CUDA graphs and their memory; they are captured again when next needed."""
        return  # nothing to do by default


class DiffusionModel(UsesMemory, ABC):
    """A frozen text-conditioned diffusion model.

    Attributes:
        name: for messages.
        device: where images are wanted and predictions come from.
        schedule: the noise levels of its timesteps, and what `predict` returns.
        image_size: height and width of images the model was trained on; others are resized by `encode`.
        default_guidance_scale: used where the config names none; convention eps_null + s (eps_text - eps_null).
        x0_range: range of a clean input if it has one (pixel models: (-1, 1)), else None.
        clip_x0: whether the estimate of the clean input is clamped to `x0_range` by default.
        revision: commit of the hub's repository that the weights are of; None: of no hub.
    """

    name: str
    device: torch.device
    schedule: NoiseSchedule
    image_size: int
    default_guidance_scale: float
    x0_range: tuple[float, float] | None = None
    clip_x0: bool = False
    revision: str | None = None

    @property
    @abstractmethod
    def text_identity(self) -> str:
        """A string that changes whenever the embedding of some text could change: the key of the embedding cache."""

    @abstractmethod
    def embed_texts(self, texts: list[Prompt]) -> dict[str, Tensor]:
        """Embed n texts -> name -> [n, ...]. The text encoder is loaded for this call alone and freed after it."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Differentiable map from images [B, 3, H, W] in [0, 1] to the model's input [B, C, h, w] in their dtype."""

    @abstractmethod
    def predict(self, noisy: Tensor, t: Tensor, condition: Mapping[str, Tensor], views: Views) -> Tensor:
        """Evaluate all conditions in one batch; called under no_grad.

        Args:
            noisy: [B, C, h, w], the same for all K conditions.
            t: [B] int64.
            condition: name -> [K B, ...] as `PromptEmbeddings.select` gives it.
            views: B views.

        Returns:
            [K B, C, h, w]: B predictions under the first condition, then B under the second, and so on.
        """

    def load(self) -> None:
        """Load what `encode` and `predict` need, if that is put off until first use. May be called more than once."""
        return  # most models are loaded when they are made


class Guidance(UsesMemory, ABC):
    """Pulls images towards a prompt.

    Attributes:
        name: for messages.
        image_size: height and width of images the model was trained on.
        revision: commit of the hub's repository that the weights are of; None: of no hub.
    """

    name: str
    image_size: int
    revision: str | None = None

    @abstractmethod
    def embed(self, prompts: PromptSet | str) -> PromptEmbeddings:
        """Embed a prompt for every direction, once: from the cache if it was embedded before."""

    def load(self) -> None:
        """Load weights that are not loaded yet; without this, the first gradient does. May be called more than once."""
        return  # guidances are free to load when they are made

    @abstractmethod
    def sds_gradient(
        self,
        images: Tensor,
        embeddings: PromptEmbeddings,
        views: Views,
        t_range: tuple[float, float] = T_RANGE,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        grad_clip: float | None = None,
        sds_share: float | None = None,
        part: BatchPart | None = None,
    ) -> SDSOutput:
        """Gradient that makes the images more likely under the prompt.

        Args:
            images: [B, 3, H, W] in [0, 1], on the guidance's device; any H and W.
            embeddings: from `embed`, on the same device.
            views: of the B images.
            t_range: timesteps are drawn uniformly between these fractions of the model's noise schedule, ends included.
                A run sets them by its `ScheduleConfig`.
            guidance_scale, grad_clip: in place of the config's for this call.
            sds_share: share of the residual of score distillation; the rest is that of classifier score distillation.
                None: all of it. With mode "csd" it counts as 0.
            part: which views of a batch the images are; by default all.
            generator: source of timesteps and noise. A CPU generator gives the same numbers on every device.

        Raises:
            NonFiniteError: images or gradient hold a NaN or an infinity.
            ValueError: an argument that does not fit, such as a t_range other than 0 <= low <= high <= 1.
        """
