"""Score distillation, once, for every diffusion model and every method."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dreamfusion_fast.errors import NonFiniteError, UserError
from dreamfusion_fast.gpu.stages import stage
from dreamfusion_fast.guidance.cache import EmbeddingCache
from dreamfusion_fast.guidance.config import GuidanceConfig
from dreamfusion_fast.guidance.contract import (
    DiffusionModel,
    Guidance,
    GuidanceOutput,
    GuidanceRequest,
    PromptEmbeddings,
)
from dreamfusion_fast.guidance.methods import (
    ClassifierScoreDistillation,
    Method,
    MixedScoreDistillation,
    Predictions,
)
from dreamfusion_fast.guidance.prompts import PromptSet

METHODS: dict[str, type[Method]] = {"sds": MixedScoreDistillation, "csd": ClassifierScoreDistillation}
"""The methods that a config's mode names; "sds" is SDS alone unless a request says otherwise."""


class ScoreDistillation(Guidance):
    """Distillation of any `DiffusionModel` by any `Method`.

    Args:
        model: what predicts.
        config: how; its name is not read.
        cache: of prompt embeddings; by default the user's, if the config wants one.
        method: what is made of predictions; by default what the config's mode says. It is moved to the model's device.

    Raises:
        UserError: clip_x0 asked of a model whose input has no fixed range (a latent model).
    """

    def __init__(
        self,
        model: DiffusionModel,
        config: GuidanceConfig | None = None,
        cache: EmbeddingCache | None = None,
        method: Method | None = None,
    ):
        self.model = self.inner = model
        self.config = config or GuidanceConfig()
        self.name = model.name
        self.image_size = model.image_size
        self.revision = model.revision
        self.guidance_scale = self._scale()
        self.clip_x0 = model.clip_x0 if self.config.clip_x0 is None else self.config.clip_x0
        if self.clip_x0 and model.x0_range is None:
            raise UserError(
                f"guidance clip_x0 needs a pixel-space model, and {model.name} works on latents: turn it off"
            )
        self.method = (METHODS[self.config.mode]() if method is None else method).to(model.device)
        self._groups = self.method.parameter_groups()
        self._parameters = [parameter for group in self._groups for parameter in group["params"]]
        self._cache = cache if cache is not None else (EmbeddingCache() if self.config.cache else None)
        self._finite = _FiniteGuard(model.name)

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
            model = self.model
            tensors = self._cache.get_or_compute(
                model.text_identity, prompts.texts, model.embed_texts, model.text_shapes()
            )
        return PromptEmbeddings(tensors).to(self.model.device)

    def gradient(self, request: GuidanceRequest) -> GuidanceOutput:
        """See `Guidance.gradient`. Arithmetic is in the images' dtype, the model's evaluation in its own.

        On a GPU the check for NaN does not wait for the device: the error comes with a later call.
        """
        images, batch = request.images.detach(), len(request.images)
        if images.device.type != self.model.device.type:
            raise ValueError(f"images must be on {self.model.device}, the guidance's device, got {images.device}")
        gradients: list[Tensor] = []
        sizes: list[Tensor] = []
        losses: list[Tensor] = []
        parameter_gradients: Sequence[Tensor] = ()
        step = request.views_per_call or batch
        for first in range(0, batch, step):
            rows = slice(first, first + step)
            part = images[rows].requires_grad_(True)
            with torch.enable_grad(), stage("encode"):
                x = self.model.encode(part)
            if first == 0:  # only now it is known what the noise is like
                t, noise = self._draw(x, request)
            predictions, residual, pull = self._pull(x.detach(), t[rows], noise[rows], rows, request)
            with stage("encode backward"):
                gradients += torch.autograd.grad(x, part, grad_outputs=pull)
            sizes.append(residual.square().flatten(1).mean(dim=1).sqrt())
            with torch.enable_grad():
                loss = self.method.loss(predictions)
            if loss is not None:  # its backward is done at once, so that no part's graph is kept beside the next
                losses.append(loss.detach() * (len(part) / batch))
                added = torch.autograd.grad(loss * (len(part) / batch), self._parameters)
                before = parameter_gradients
                parameter_gradients = [a + b for a, b in zip(before, added, strict=True)] if before else added
        gradient = _joined(gradients)
        self._finite.check(images, gradient)
        loss = torch.stack(losses).sum() if losses else None
        return GuidanceOutput(gradient, t, _joined(sizes), loss, parameter_gradients)

    @torch.no_grad()
    def _pull(
        self, clean: Tensor, t: Tensor, noise: Tensor, rows: slice, request: GuidanceRequest
    ) -> tuple[Predictions, Tensor, Tensor]:
        """Predictions for some views of a batch, the method's residual, and its weighted and clipped form."""
        level = self.model.schedule.at(t, clean.dtype)
        predictions = Predictions(
            model=self.model,
            embeddings=request.embeddings,
            views=request.views[rows],
            t=t,
            clean=clean,
            noise=noise,
            noisy=level.noisy(clean, noise),
            level=level,
            scale=self.guidance_scale,
            convention=self.config.convention,
            x0_range=self.model.x0_range if self.clip_x0 else None,
            sds_share=request.sds_share,
        )
        with stage("unet"):
            predictions.outputs = predictions.predict(self.method.conditions)
        residual = self.method.residual(predictions)
        pull, clip = level.weight(self.config.weighting) * residual, self.config.grad_clip
        if clip is not None:
            size = pull.norm(dim=1, keepdim=True)
            pull = pull * (clip / size.clamp_min(clip))
        return predictions, residual, pull

    def parameter_groups(self) -> list[dict[str, Any]]:
        """See `Guidance.parameter_groups`: the method's."""
        return self._groups

    def state(self) -> dict[str, Tensor]:
        """See `Guidance.state`: the method's."""
        return self.method.state_dict()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Guidance.load_state`."""
        self.method.load_state_dict(state)

    def _draw(self, x: Tensor, request: GuidanceRequest) -> tuple[Tensor, Tensor]:
        """Timesteps `[B]` int64 and noise `[B, ...]` of all images, for an input `x` of the first part of them.

        Timesteps are uniform over those between both fractions of the schedule, ends included; noise is standard
        normal. Both are drawn in float32 where the generator lives, so that a seed means one noise everywhere.
        """
        steps, images, generator = self.model.schedule.steps, len(request.images), request.generator
        batch = request.first_view + images if request.batch is None else request.batch
        low, high = (min(round(fraction * steps), steps - 1) for fraction in request.t_range)
        where = generator.device if generator is not None else torch.device("cpu")
        pinned = x.is_cuda and where.type == "cpu"  # so that no copy waits
        t = torch.empty(batch, dtype=torch.int64, device=where, pin_memory=pinned)
        torch.randint(low, high + 1, (batch,), generator=generator, out=t)
        noise = torch.empty(batch, *x.shape[1:], dtype=torch.float32, device=where, pin_memory=pinned)
        torch.randn(noise.shape, generator=generator, out=noise)
        device, own = self.model.device, slice(request.first_view, request.first_view + images)
        t, noise = t[own], noise[own]
        return t.to(device, non_blocking=True), noise.to(device, x.dtype, non_blocking=True)


def _joined(parts: list[Tensor]) -> Tensor:
    """The rows of all parts; those of a single one are not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _FiniteGuard:
    """Raises when images or gradients stop being finite, on a GPU without waiting for it.

    There, each call leaves a flag on its way to the host and looks at the flags that have arrived since. Messages count
    calls, from 1, and know of no steps: a resumed run begins with another guard.
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
