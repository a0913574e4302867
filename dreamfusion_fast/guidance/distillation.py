"""Score distillation, once, for every diffusion model and every method."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
from dreamfusion_fast.guidance.memory import GuidanceMemory
from dreamfusion_fast.guidance.methods import (
    ClassifierScoreDistillation,
    Combination,
    Distilled,
    Guiding,
    IntervalScoreMatching,
    Method,
    MixedDistillation,
    Predictions,
    RectifiedFlowDistillation,
    ScoreDistillationSampling,
    ScoreDistillationViaInversion,
    VariationalScoreDistillation,
)
from dreamfusion_fast.guidance.prompts import PromptSet, dropped_words

METHODS: dict[str, Callable[[GuidanceConfig], Method]] = {
    "sds": lambda config: ScoreDistillationSampling(),
    "csd": lambda config: ClassifierScoreDistillation(),
    "sdi": lambda config: ScoreDistillationViaInversion(config.sdi),
    "ism": lambda config: IntervalScoreMatching(config.ism),
    "vsd": lambda config: VariationalScoreDistillation(config.vsd),
    "rfds": lambda config: RectifiedFlowDistillation(),
}
"""The methods that a config's mode and second mode name."""


def create_method(config: GuidanceConfig) -> Method:
    """The method that a config names; of two, which one pulls is up to the requests (`GuidanceRequest.sds_share`)."""
    first, second = config.modes
    method = METHODS[first](config)
    return method if second is None else MixedDistillation(method, METHODS[second](config))


# The graph of one prediction, kept for the gradient of what is trained in a network, takes about as much as so many
# guided pairs without one. An estimate: half of the activations of a U-Net are of its widest level.
_PAIRS_OF_A_GRAPH = 16
# A mean over a whole input has gradients that vanish in float16 on their way through a network. A power of two changes
# no other digit.
_LOSS_SCALE = 1024.0


class ScoreDistillation(Guidance):
    """Distillation of any `DiffusionModel` by any `Method`.

    Args:
        model: what predicts.
        config: how; its name is not read.
        cache: of prompt embeddings; by default the user's, if the config wants one.
        method: what is made of predictions; by default what the config's modes say. It is moved to the model's device.

    Raises:
        UserError: clip_x0 asked of a model whose input has no fixed range (a latent model), or a method that is not for
            such a model.
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
        self.files = model.files
        self.views_per_group = model.views_per_group
        self.clip_x0 = model.clip_x0 if self.config.clip_x0 is None else self.config.clip_x0
        if self.clip_x0 and model.x0_range is None:
            raise UserError(
                f"guidance clip_x0 needs a pixel-space model, and {model.name} works on latents: turn it off"
            )
        self.method = create_method(self.config) if method is None else method
        self.method.attach(model, self._guiding())
        self._groups = self.method.parameter_groups()
        self._parameters = [parameter for group in self._groups for parameter in group["params"]]
        self._cache = cache if cache is not None else (EmbeddingCache() if self.config.cache else None)
        self._finite = _FiniteGuard(model.name)

    def _guiding(self) -> Guiding:
        """What the config says to every method."""
        config = self.config
        combination = Combination(0.0, config.convention, config.guidance_rescale, config.perp_neg)
        return Guiding(combination, config.guidance_scale, config.weighting)

    @property
    def guidance_scale(self) -> float:
        """s of the (first) method, in the config's convention."""
        return self.method.combination.scale

    def memory_needs(self, batch: int, render_size: int) -> GuidanceMemory:
        """See `UsesMemory.memory_needs`: the model's, more where the method asks for more, or trains something."""
        needs = super().memory_needs(batch, render_size)
        # A model says what a guided pair takes.
        needs = replace(needs, unet=needs.unet * max(len(self.method.asked), 2) // 2)
        if not self._parameters:
            return needs
        return replace(needs, unet=needs.unet + needs.unet * _PAIRS_OF_A_GRAPH // 2, offloadable=0)

    def embed(self, prompts: PromptSet | str) -> PromptEmbeddings:
        """See `Guidance.embed`; for a plain string the config says the rest of a `PromptSet`."""
        if isinstance(prompts, str):
            c = self.config
            prompts = PromptSet(prompts, c.negative_prompt, c.view_dependent, dropped_words(c.drop_words))
        if self._cache is None:
            tensors = self.model.embed_texts(prompts.texts)
        else:
            model = self.model
            tensors = self._cache.get_or_compute(
                model.text_identity, prompts.texts, model.embed_texts, model.text_shapes()
            )
        interpolated = prompts.view_dependent and (self.config.interpolate_views or self.config.perp_neg)
        return PromptEmbeddings(tensors, interpolated).to(self.model.device)

    def gradient(self, request: GuidanceRequest) -> GuidanceOutput:
        """See `Guidance.gradient`. Arithmetic is in the images' dtype, the model's evaluation in its own.

        On a GPU the check for NaN does not wait for the device: the error comes with a later call.
        """
        images, batch = request.images.detach(), len(request.images)
        if images.device.type != self.model.device.type:
            raise ValueError(f"images must be on {self.model.device}, the guidance's device, got {images.device}")
        group = self.views_per_group
        if request.views.group != group:
            raise ValueError(
                f"views.group: got {request.views.group}, want {group}, as many views as {self.name} reads together"
            )
        gradients: list[Tensor] = []
        sizes: list[Tensor] = []
        losses: list[Tensor] = []
        parameter_gradients: Sequence[Tensor] = ()
        step = max((request.views_per_call or batch) // group, 1) * group
        for first in range(0, batch, step):
            rows = slice(first, first + step)
            part = images[rows].requires_grad_(True)
            with torch.enable_grad(), stage("encode"):
                x = self.model.encode(part)
            if first == 0:  # only now it is known what the noise is like
                t, noise, draws = self._draw(x, request)
            distilled = self._distil(x.detach(), t[rows], noise[rows], draws[:, rows], rows, request)
            if distilled.loss is not None:  # backward at once, so that no part's graph is kept beside another
                loss = distilled.loss * (len(part) / batch)
                losses.append(loss.detach())
                scaled = torch.autograd.grad(_LOSS_SCALE * loss, self._parameters)
                added = list(torch._foreach_div(scaled, _LOSS_SCALE))
                before = parameter_gradients
                parameter_gradients = [a + b for a, b in zip(before, added, strict=True)] if before else added
            pull = self._clipped(distilled.pull, request.progress)
            with stage("encode backward"):
                gradients += torch.autograd.grad(x, part, grad_outputs=pull)
            sizes.append(distilled.residual.square().flatten(1).mean(dim=1).sqrt())
        gradient = _joined(gradients)
        self._finite.check(images, gradient)
        total = torch.stack(losses).sum() if losses else None
        return GuidanceOutput(gradient, t, _joined(sizes), total, parameter_gradients)

    @torch.no_grad()
    def _distil(
        self, clean: Tensor, t: Tensor, noise: Tensor, draws: Tensor, rows: slice, request: GuidanceRequest
    ) -> Distilled:
        """What the method makes of some views of a batch."""
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
            combination=self.method.combination,
            x0_range=self.model.x0_range if self.clip_x0 else None,
            sds_share=request.sds_share,
            t_most=self._timesteps(request)[1],
            draws=draws,
        )
        with stage("unet"):
            return self.method.distil(predictions)

    def _clipped(self, pull: Tensor, progress: float) -> Tensor:
        """The pull with its norm over channels limited as the config says, here and now."""
        start, end = self.config.grad_clip, self.config.grad_clip_end
        if start is None:
            return pull
        clip = start if end is None else start + (end - start) * progress
        return pull * (clip / pull.norm(dim=1, keepdim=True).clamp_min(clip))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """See `Guidance.parameter_groups`: the method's."""
        return self._groups

    def state(self) -> dict[str, Tensor]:
        """See `Guidance.state`: the method's."""
        return self.method.state_dict()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Guidance.load_state`."""
        self.method.load_state_dict(state)

    def _timesteps(self, request: GuidanceRequest) -> tuple[int, int]:
        """The smallest and the largest timestep that may be drawn."""
        steps = self.model.schedule.steps
        low, high = (min(round(fraction * steps), steps - 1) for fraction in request.t_range)
        return low, high

    def _draw(self, x: Tensor, request: GuidanceRequest) -> tuple[Tensor, Tensor, Tensor]:
        """Timesteps `[B]` int64, noise `[B, ...]` and the method's draws `[n, B, ...]`, all of the whole batch.

        `x` is the input of the images' first part; what is drawn for views that are not the request's is left out.
        Timesteps are uniform over those between both fractions of the schedule,
        ends included, one for each group of views; noise is standard normal. All is drawn in float32 where the
        generator lives, so that a seed means one noise everywhere.
        """
        images, generator, group = len(request.images), request.generator, self.views_per_group
        batch = request.first_view + images if request.batch is None else request.batch
        low, high = self._timesteps(request)
        where = generator.device if generator is not None else torch.device("cpu")
        pinned = x.is_cuda and where.type == "cpu"  # so that no copy waits
        t = torch.empty(batch // group, dtype=torch.int64, device=where, pin_memory=pinned)
        torch.randint(low, high + 1, t.shape, generator=generator, out=t)
        noise = torch.empty(1 + self.method.draws, batch, *x.shape[1:], device=where, pin_memory=pinned)
        torch.randn(noise.shape, generator=generator, out=noise)
        device, own = self.model.device, slice(request.first_view, request.first_view + images)
        t = t.repeat_interleave(group) if group > 1 else t
        t, noise = t[own].to(device, non_blocking=True), noise[:, own].to(device, x.dtype, non_blocking=True)
        return t, noise[0], noise[1:]


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
