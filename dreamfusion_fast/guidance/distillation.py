"""Score distillation, once, for every diffusion model and every method."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from dreamfusion_fast.errors import NonFiniteError, UserError
from dreamfusion_fast.gpu.stages import stage
from dreamfusion_fast.guidance.cache import EmbeddingCache
from dreamfusion_fast.guidance.config import GuidanceConfig
from dreamfusion_fast.guidance.contract import T_RANGE, DiffusionModel, Guidance, PromptEmbeddings, SDSOutput, Views
from dreamfusion_fast.guidance.memory import BatchPart, GuidanceMemory
from dreamfusion_fast.guidance.methods import (
    ClassifierScoreDistillation,
    Method,
    Predictions,
    ScoreDistillationSampling,
)
from dreamfusion_fast.guidance.prompts import PromptSet


class ScoreDistillation(Guidance):
    """Distillation of any `DiffusionModel` by SDS, CSD, or a mixture of both.

    Raises:
        UserError: clip_x0 asked of a model whose input has no fixed range (a latent model).
    """

    def __init__(
        self, model: DiffusionModel, config: GuidanceConfig | None = None, cache: EmbeddingCache | None = None
    ):
        self.model = model
        self.config = config or GuidanceConfig()
        self.name = model.name
        self.image_size = model.image_size
        self.revision = model.revision
        self.guidance_scale = self._scale()
        self.clip_x0 = model.clip_x0 if self.config.clip_x0 is None else self.config.clip_x0
        if self.config.mode == "csd":
            self.clip_x0 = False
        if self.clip_x0 and model.x0_range is None:
            raise UserError(
                f"guidance clip_x0 needs a pixel-space model, and {model.name} works on latents: turn it off"
            )
        self._cache = cache if cache is not None else (EmbeddingCache() if self.config.cache else None)
        self._finite = _FiniteGuard(model.name)
        self._sds, self._csd = ScoreDistillationSampling(), ClassifierScoreDistillation()

    def _scale(self) -> float:
        """The config's scale; the model's default is given in the "null" convention and turned into the config's."""
        if self.config.guidance_scale is not None:
            return self.config.guidance_scale
        default = self.model.default_guidance_scale
        return default if self.config.convention == "null" else default - 1.0

    def embed(self, prompts: PromptSet | str) -> PromptEmbeddings:
        """See `Guidance.embed`; a plain string takes negative prompt and view dependence from the config."""
        if isinstance(prompts, str):
            prompts = PromptSet(prompts, self.config.negative_prompt, self.config.view_dependent)
        if self._cache is None:
            tensors = self.model.embed_texts(prompts.texts)
        else:
            tensors = self._cache.get_or_compute(self.model.text_identity, prompts.texts, self.model.embed_texts)
        return PromptEmbeddings(tensors).to(self.model.device)

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
        """See `Guidance.sds_gradient`. Arithmetic is in the images' dtype, the model's evaluation in its own.

        On a GPU the check for NaN does not wait for the device: the error comes with a later call. With a `part` the
        images are some views of a batch; see `BatchPart`.
        """
        self._check(images, views)
        config, model = self.config, self.model
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        clip = config.grad_clip if grad_clip is None else grad_clip
        share = 0.0 if config.mode == "csd" else 1.0 if sds_share is None else sds_share
        if not 0 <= share <= 1:
            raise ValueError(f"sds_share: got {share}, want 0 to 1")
        if len(t_range) != 2 or not 0 <= t_range[0] <= t_range[1] <= 1:
            raise ValueError(f"t_range: got {t_range}, want (low, high) with 0 <= low <= high <= 1")

        images = images.detach().requires_grad_(True)
        with torch.enable_grad(), stage("encode"):
            x = model.encode(images)
        with torch.no_grad():
            clean = x.detach()
            t, noise = self._draw(clean, t_range, generator, part)
            level = model.schedule.at(t, clean.dtype)
            noisy = level.noisy(clean, noise)
            methods = self._methods(share)
            conditions = tuple(dict.fromkeys(name for method, _ in methods for name in method.conditions))
            with stage("unet"):
                rows = embeddings.select(conditions, views)
                outputs = model.predict(noisy, t, rows, views).to(clean.dtype).chunk(len(conditions))
            predictions = Predictions(
                outputs=dict(zip(conditions, outputs, strict=True)),
                clean=clean,
                noise=noise,
                noisy=noisy,
                level=level,
                scale=scale,
                convention=config.convention,
                x0_range=model.x0_range if self.clip_x0 else None,
            )
            residual = _mixed([(method.residual(predictions), part_of_all) for method, part_of_all in methods])
            pull = level.weight(config.weighting) * residual
            if clip is not None:
                size = pull.norm(dim=1, keepdim=True)
                pull = pull * (clip / size.clamp_min(clip))
        with stage("encode backward"):
            (gradient,) = torch.autograd.grad(x, images, grad_outputs=pull)
        self._finite.check(images, gradient)
        return SDSOutput(
            gradient=gradient,
            t=t,
            norm=gradient.flatten(1).norm(dim=1),
            residual=residual.square().flatten(1).mean(dim=1).sqrt(),
            x0=predictions.x0,
        )

    def _methods(self, share: float) -> list[tuple[Method, float]]:
        """The methods that have a share in the residual, and their shares."""
        both = (self._sds, share), (self._csd, 1 - share)
        return [(method, part) for method, part in both if part > 0]

    def _check(self, images: Tensor, views: Views) -> None:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have shape [B, 3, H, W], got {tuple(images.shape)}")
        if images.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"images must be float32 or float64, got {images.dtype}")
        if images.device.type != self.model.device.type:
            raise ValueError(f"images must be on {self.model.device}, the guidance's device, got {images.device}")
        if len(images) == 0 or len(views) != len(images):
            raise ValueError(f"one view per image and at least one are needed, got {len(views)} and {len(images)}")

    def load(self) -> None:
        """See `Guidance.load`."""
        self.model.load()

    def memory_needs(self, batch: int, render_size: int) -> GuidanceMemory:
        """See `UsesMemory.memory_needs`."""
        return self.model.memory_needs(batch, render_size)

    def set_recompute(self, on: bool) -> None:
        """See `UsesMemory.set_recompute`."""
        self.model.set_recompute(on)

    def set_offload(self, on: bool) -> None:
        """See `UsesMemory.set_offload`."""
        self.model.set_offload(on)

    def free_graphs(self) -> None:
        """See `UsesMemory.free_graphs`."""
        self.model.free_graphs()

    def _draw(
        self,
        clean: Tensor,
        t_range: tuple[float, float],
        generator: torch.Generator | None,
        part: BatchPart | None,
    ) -> tuple[Tensor, Tensor]:
        """Timesteps `[B]` int64 and noise like `clean` `[B, ...]`, on its device.

        Timesteps are uniform over those between both fractions of the schedule, ends included; noise is standard
        normal. Both are drawn in float32 where the generator lives, so that a seed means one noise everywhere, and for
        the whole batch if `clean` is a part of it.
        """
        steps, batch = self.model.schedule.steps, len(clean) if part is None else part.batch
        rows = slice(0, batch) if part is None else slice(part.first, part.first + len(clean))
        low, high = (min(round(fraction * steps), steps - 1) for fraction in t_range)
        where = generator.device if generator is not None else torch.device("cpu")
        pinned = clean.is_cuda and where.type == "cpu"  # so that no copy waits
        t = torch.empty(batch, dtype=torch.int64, device=where, pin_memory=pinned)
        torch.randint(low, high + 1, (batch,), generator=generator, out=t)
        noise = torch.empty(batch, *clean.shape[1:], dtype=torch.float32, device=where, pin_memory=pinned)
        torch.randn(noise.shape, generator=generator, out=noise)
        device = self.model.device
        return t[rows].to(device, non_blocking=True), noise[rows].to(device, clean.dtype, non_blocking=True)


def _mixed(residuals: list[tuple[Tensor, float]]) -> Tensor:
    """The weighted sum; the one that is all of it as it is."""
    if len(residuals) == 1:
        return residuals[0][0]
    (first, share), (second, rest) = residuals
    return share * first + rest * second


class _FiniteGuard:
    """Raises when images or gradients stop being finite, on a GPU without waiting for it.

    There, each call leaves a flag on its way to the host and looks at the flags that have arrived since. Messages count
    calls, from 1, and know of no steps: a step whose views go in parts makes several calls, and a resumed run begins
    with another guard.
    """

    _MAX_PENDING = 64

    def __init__(self, name: str):
        self._name = name
        self._calls = 0
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event]] = deque()

    def check(self, images: Tensor, gradient: Tensor) -> None:
        flags = torch.stack((images.detach().isfinite().all(), gradient.isfinite().all()))
        self._calls += 1
        if not flags.is_cuda:
            self._raise_if_bad(self._calls, flags)
            return
        if torch.cuda.is_current_stream_capturing():
            return
        host = torch.empty(2, dtype=torch.bool, pin_memory=True).copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(flags.device))
        self._pending.append((self._calls, host, event))
        if len(self._pending) > self._MAX_PENDING:
            self._pending[0][2].synchronize()
        while self._pending and self._pending[0][2].query():
            done_call, done, _ = self._pending.popleft()
            self._raise_if_bad(done_call, done)

    def _raise_if_bad(self, call: int, flags: Tensor) -> None:
        images_finite, gradient_finite = flags.tolist()
        if not images_finite:
            raise NonFiniteError(
                f"guidance call {call}: the rendered images hold NaN or infinity: lower the learning rate or resume "
                "from an earlier checkpoint"
            )
        if not gradient_finite:
            raise NonFiniteError(
                f"guidance call {call}: the gradient from {self._name} holds NaN or infinity: use guidance "
                "dtype bfloat16 or float32, or a lower guidance scale"
            )
