"""The interface between a trainer and a diffusion model: images, views, prompt embeddings, and a gradient.

`Guidance` is what a trainer sees. `DiffusionModel` is what a diffusion model has to say about itself for
`dreamfusion_fast.guidance.distillation.ScoreDistillation`, the one implementation of `Guidance`, to use it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance.memory import UsesMemory
from dreamfusion_fast.guidance.models.schedule import NoiseSchedule
from dreamfusion_fast.guidance.prompts import VIEW_NAMES, Prompt, PromptSet, view_index, view_shares

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
        camera_to_world: [B, 4, 4] poses, camera space x right, y up, looking along -z; None: not known.
        fov_y: [B] vertical field of view, radians; None: not known.
        group: so many views, one after another, show the object together: a model for several views reads them as one.
            They share a timestep, and have a noise each.
    """

    azimuth: Tensor
    elevation: Tensor
    background: Tensor | None = None
    shading: ShadingName = "albedo"
    camera_to_world: Tensor | None = None
    fov_y: Tensor | None = None
    group: int = 1

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
        if self.camera_to_world is not None and self.camera_to_world.shape != (len(self), 4, 4):
            shape = tuple(self.camera_to_world.shape)
            raise ValueError(f"camera_to_world must have shape [{len(self)}, 4, 4], got {shape}")
        if self.fov_y is not None and self.fov_y.shape != (len(self),):
            raise ValueError(f"fov_y must have shape [{len(self)}], got {tuple(self.fov_y.shape)}")
        if self.group < 1 or len(self) % self.group:
            raise ValueError(f"group: got {self.group}, want a divisor of the number of views, {len(self)}")

    def __len__(self) -> int:
        return self.azimuth.shape[0]

    def __getitem__(self, rows: slice) -> Views:
        """Some of the views, in whole groups."""

        def some(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        return replace(
            self,
            azimuth=self.azimuth[rows],
            elevation=self.elevation[rows],
            background=some(self.background),
            camera_to_world=some(self.camera_to_world),
            fov_y=some(self.fov_y),
        )


@dataclass(frozen=True)
class PromptEmbeddings:
    """Embedded prompts, one row per direction of `VIEW_NAMES` and the unconditional text last.

    Args:
        tensors: name -> [5, ...]. The names belong to the model ("hidden" for the sequence, and what else it needs).
        interpolated: the text of a view is what lies between those of the directions next to it, by `view_shares`;
            False: that of the direction that the view counts as.
    """

    tensors: Mapping[str, Tensor]
    interpolated: bool = False

    ROWS = len(VIEW_NAMES) + 1

    def __post_init__(self) -> None:
        if not self.tensors:
            raise ValueError("tensors must hold at least one named tensor")
        for name, value in self.tensors.items():
            if value.ndim < 2 or value.shape[0] != self.ROWS:
                raise ValueError(f"tensors[{name!r}] must have shape [{self.ROWS}, ...], got {tuple(value.shape)}")

    def to(self, device: torch.device | str) -> PromptEmbeddings:
        return replace(self, tensors={name: value.to(device) for name, value in self.tensors.items()})

    def select(self, conditions: Sequence[str], views: Views) -> dict[str, Tensor]:
        """Rows for each view under each condition, on the embeddings' device and without waiting for it.

        Args:
            conditions: "null" for the unconditional row, "text" for what each view's direction says, or one of
                `VIEW_NAMES` for that direction's row.
            views: B of them.

        Returns:
            name -> [K B, ...]: B rows of the first condition, then B of the second, and so on.
        """
        text = view_index(views.azimuth, views.elevation)
        fixed = {"null": len(VIEW_NAMES), **{name: row for row, name in enumerate(VIEW_NAMES)}}
        rows = torch.cat([text if name == "text" else torch.full_like(text, fixed[name]) for name in conditions])
        selected = {name: value.index_select(0, rows.to(value.device)) for name, value in self.tensors.items()}
        if not self.interpolated or "text" not in conditions:
            return selected
        shares = view_shares(views.azimuth, views.elevation)
        first = list(conditions).index("text") * len(views)
        for name, value in self.tensors.items():
            # Term by term: a matrix product of one row rounds in another order than one of many.
            columns = shares.to(value.device, value.dtype).T.view(len(VIEW_NAMES), -1, *[1] * (value.ndim - 1))
            mixed = selected[name][first : first + len(views)].zero_()  # in place
            for column, direction in zip(columns, value, strict=False):  # without the unconditional row, the last
                mixed.addcmul_(column, direction)
        return selected


@dataclass(frozen=True)
class GuidanceRequest:
    """Images that are to be pulled towards a prompt.

    Args:
        images: [B, 3, H, W] float32 or float64 in [0, 1], on the guidance's device; any H and W.
        embeddings: from `Guidance.embed`, on the same device.
        views: of the B images.
        t_range: timesteps are drawn uniformly between these fractions of the model's noise schedule, ends included.
            A run sets them by its `ScheduleConfig`.
        generator: source of timesteps and noise. A CPU generator gives the same numbers on every device.
        sds_share: where a guidance has two methods, share of the first one in the pull, which by default is score
            distillation; the rest is that of the second one. A guidance of one method does not read it.
        views_per_call: most views in one call of the model, for the memory of so many, but at least one group of them;
            None: all. Timesteps and noise are drawn for the whole batch all the same.
        progress: fraction of the run that is done, 0 to 1.
        first_view, batch: the images are those of the views from `first_view` on of a batch of so many, whose others
            another process has: timesteps and noise are drawn for all of them. By default they are the whole batch.

    Raises:
        ValueError, TypeError: an argument that does not fit, such as a t_range other than 0 <= low <= high <= 1.
    """

    images: Tensor
    embeddings: PromptEmbeddings
    views: Views
    t_range: tuple[float, float] = T_RANGE
    generator: torch.Generator | None = None
    sds_share: float = 1.0
    views_per_call: int | None = None
    progress: float = 0.0
    first_view: int = 0
    batch: int | None = None

    def __post_init__(self) -> None:
        images, views, t_range = self.images, self.views, self.t_range
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have shape [B, 3, H, W], got {tuple(images.shape)}")
        if images.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"images must be float32 or float64, got {images.dtype}")
        if len(images) == 0 or len(views) != len(images):
            raise ValueError(f"one view per image and at least one are needed, got {len(views)} and {len(images)}")
        if len(t_range) != 2 or not 0 <= t_range[0] <= t_range[1] <= 1:
            raise ValueError(f"t_range: got {t_range}, want (low, high) with 0 <= low <= high <= 1")
        if not 0 <= self.sds_share <= 1:
            raise ValueError(f"sds_share: got {self.sds_share}, want 0 to 1")
        if self.views_per_call is not None and self.views_per_call < 1:
            raise ValueError(f"views_per_call: got {self.views_per_call}, want at least 1")
        if not 0 <= self.progress <= 1:
            raise ValueError(f"progress: got {self.progress}, want 0 to 1")
        if self.first_view < 0 or (self.batch is not None and self.first_view + len(images) > self.batch):
            raise ValueError(
                f"first_view, batch: got {self.first_view}, {self.batch} with {len(images)} images, want a batch that "
                "has them"
            )


class GuidanceOutput(NamedTuple):
    """The answer to one request; everything is detached and on the device of the images.

    Attributes:
        gradient: [B, 3, H, W], dtype of the images: the gradient with respect to the images in [0, 1] of the objective
            sum over views of <stop_gradient(w(t) residual), x>, where x is the model's input for the image and the
            residual of score distillation is eps_hat - eps. It is summed over views, channels and pixels, and divided
            by nothing.
        t: [B] int64, timestep of each view.
        residual: [B] root mean square of the residual over the model's input.
        loss: 0-dim, the guidance's own loss; None: it trains nothing.
        parameter_gradients: of that loss, in the order of the parameters in `Guidance.parameter_groups`.
    """

    gradient: Tensor
    t: Tensor
    residual: Tensor
    loss: Tensor | None = None
    parameter_gradients: Sequence[Tensor] = ()


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
        views_per_group: views that it reads as one (`Views.group`).
        revision: commit of the hub's repository that the weights are of; None: of no hub.
        files: sha256 of single files that the model is made of, by path, and commits of other repositories, by hub id.
    """

    name: str
    device: torch.device
    schedule: NoiseSchedule
    image_size: int
    default_guidance_scale: float
    x0_range: tuple[float, float] | None = None
    clip_x0: bool = False
    views_per_group: int = 1
    revision: str | None = None
    files: Mapping[str, str] = MappingProxyType({})

    @property
    @abstractmethod
    def text_identity(self) -> str:
        """A string that changes whenever the embedding of some text could change: the key of the embedding cache."""

    @abstractmethod
    def embed_texts(self, texts: list[Prompt]) -> dict[str, Tensor]:
        """Embed n texts -> name -> [n, ...]. The text encoder is loaded for this call alone and freed after it."""

    def text_shapes(self) -> Mapping[str, tuple[int | None, ...]]:
        """The shape behind n of each tensor of `embed_texts`, None for any length; empty if it is not known before.

        Embeddings on disk that are of another one are not taken.
        """
        return {}

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Differentiable map from images [B, 3, H, W] in [0, 1] to the model's input [B, C, h, w] in their dtype."""

    def decode(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] of inputs [B, C, h, w], to look at; without gradients.

        What it needs beside the weights of `predict` is loaded for this call alone and freed after it.
        """
        if self.x0_range is None:
            raise NotImplementedError(f"{self.name} has no decoder")
        low, high = self.x0_range
        return ((x.detach() - low) / (high - low)).clamp(0, 1)

    @abstractmethod
    def predict(self, noisy: Tensor, t: Tensor, condition: Mapping[str, Tensor], views: Views) -> Tensor:
        """Evaluate all conditions in one batch.

        Called under no_grad, except by the loss of a method that trains parameters inside the network: with gradients
        enabled the result has to have those of such parameters, or none at all, which is an error then.

        Args:
            noisy: [B, C, h, w], the same for all K conditions.
            t: [B] int64.
            condition: name -> [K B, ...] as `PromptEmbeddings.select` gives it.
            views: B views.

        Returns:
            [K B, C, h, w]: B predictions under the first condition, then B under the second, and so on.
        """

    def trainable_network(self) -> nn.Module:
        """The network that `predict` evaluates with gradients enabled, loaded, for adapters to be put into its layers.

        From then on its weights stay where they are: `set_offload(True)` is not called. With gradients disabled,
        `predict` is that of the network without adapters, or with adapters that are turned off.

        Raises:
            UserError: there is none; the message says which methods do not work with this model.
        """
        raise UserError(f"guidance {self.name!r} has no network that could be trained: mode vsd needs one")


class Guidance(UsesMemory, ABC):
    """Pulls images towards a prompt.

    Attributes:
        name: for messages.
        image_size: height and width of images the model was trained on.
        views_per_group: views that have to show the object together (`Views.group`); a batch is a multiple of it.
        revision: commit of the hub's repository that the weights are of; None: of no hub.
        files: sha256 of single files that the model is made of, by path, and commits of other repositories, by hub id.
    """

    name: str
    image_size: int
    views_per_group: int = 1
    revision: str | None = None
    files: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def embed(self, prompts: PromptSet | str) -> PromptEmbeddings:
        """Embed a prompt for every direction, once: from the cache if it was embedded before."""

    @abstractmethod
    def gradient(self, request: GuidanceRequest) -> GuidanceOutput:
        """Gradient that makes the images more likely under the prompt.

        Raises:
            NonFiniteError: images or gradient hold a NaN or an infinity.
        """

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trained parameters as groups for Adam, each with "params" and "lr"; read once, when a run starts."""
        return []

    def state(self) -> dict[str, Tensor]:
        """Tensors that change in a run, by name, for checkpoints."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Undo `state`.

        Raises:
            RuntimeError: something lacks, is unknown, or has another shape.
        """
        if state:
            raise RuntimeError(f"guidance {self.name!r} has no state, got {', '.join(state)}")
