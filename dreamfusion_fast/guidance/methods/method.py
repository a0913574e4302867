"""The interface of a distillation method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dreamfusion_fast.guidance.contract import DiffusionModel, PromptEmbeddings, Views
from dreamfusion_fast.guidance.methods.combination import Combination
from dreamfusion_fast.guidance.methods.dreamtime import importance
from dreamfusion_fast.guidance.models.schedule import NoiseLevel, Weighting


@dataclass(eq=False)
class Predictions:
    """A model's answers to one noisy input, under several conditions, and what it takes to ask again.

    Attributes:
        model, embeddings: who answers, and the prompts.
        views: B of them.
        t: [B] int64.
        clean, noise, noisy: [B, C, h, w], the input x, the noise n, and x_t of both.
        level: the noise level of each view.
        combination: how predictions under several conditions become one.
        x0_range: what estimates of x are clamped to; None: they are not.
        sds_share: see `GuidanceRequest`.
        t_most: no timestep of the batch is larger; a number on the host, so that nobody has to wait for `t`.
        draws: [n, B, C, h, w] standard normal, as many as `Method.draws` says.
        reference: [B, C, h, w] what the noise of the guided prediction is compared with; None: `noise`.
        trained: [B, C, h, w] the output of what the method trains, with a graph; None: it trains nothing.
        outputs: condition -> [B, C, h, w], as the model gave them for `noisy`, without a graph.
    """

    model: DiffusionModel
    embeddings: PromptEmbeddings
    views: Views
    t: Tensor
    clean: Tensor
    noise: Tensor
    noisy: Tensor
    level: NoiseLevel
    combination: Combination
    x0_range: tuple[float, float] | None = None
    sds_share: float = 1.0
    t_most: int = 0
    draws: Tensor | None = None
    reference: Tensor | None = None
    trained: Tensor | None = None
    outputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """s of classifier-free guidance."""
        return self.combination.scale

    def predict(
        self, conditions: Sequence[str], noisy: Tensor | None = None, t: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Ask the model: condition -> [B, C, h, w] in the dtype of `noisy`, with a graph if gradients are enabled.

        Args:
            conditions: as `PromptEmbeddings.select` takes them.
            noisy: [B, C, h, w] another input than `noisy`.
            t: [B] int64 the timestep of that input.
        """
        noisy, t = self.noisy if noisy is None else noisy, self.t if t is None else t
        rows = self.embeddings.select(conditions, self.views)
        outputs = self.model.predict(noisy, t, rows, self.views).to(noisy.dtype)
        return dict(zip(conditions, outputs.chunk(len(conditions)), strict=True))

    def ask(self, conditions: Sequence[str]) -> None:
        """Put into `outputs` what is not there yet, in one evaluation of the model."""
        missing = [name for name in conditions if name not in self.outputs]
        if missing:
            self.outputs.update(self.predict(missing))

    def weight(self, weighting: Weighting) -> Tensor:
        """w(t) [B, 1, 1, 1]."""
        if weighting == "dreamtime":
            return importance(self.t.to(self.noisy.dtype) / self.model.schedule.steps).view(-1, 1, 1, 1)
        return self.level.weight(weighting)


class Distilled(NamedTuple):
    """What a method makes of one input.

    Attributes:
        residual: [B, C, h, w] minus the direction in which the model's input is to move, before its weight.
        pull: [B, C, h, w] the residual times w(t).
        loss: 0-dim mean over the views, with a graph to every parameter of the method; None: it has none.
    """

    residual: Tensor
    pull: Tensor
    loss: Tensor | None


class Method(nn.Module, ABC):
    """A rule that turns predictions into a pull.

    It may have parameters of its own and a loss that trains them, as the LoRA of variational score distillation. They
    are on the model's device, and its `state_dict` is in the checkpoints of a run.

    Attributes:
        conditions: what the model is asked under: "null" (the negative prompt), "text" (the prompt with the direction
            of each view), or the prompt with one direction of `VIEW_NAMES` for all views. The model is also asked for
            what `combination` needs.
        guidance_scale: s of its authors, in the "null" convention; None: the model's default.
        weighting: w(t), its authors' where a config names none.
        draws: tensors of noise that it needs beside `Predictions.noise`.
        learning_rate: of its parameters, in all steps.
        combination: how predictions are guided; `attach` makes it.
    """

    conditions: tuple[str, ...] = ("null", "text")
    guidance_scale: float | None = None
    weighting: Weighting = "sds"
    draws: int = 0
    learning_rate: float = 1e-4
    combination: Combination

    def attach(self, model: DiffusionModel, guiding: Guiding) -> None:
        """Called once, before anything else, with the model that it distils and with the config's choices."""
        scale = guiding.scale
        if scale is None:
            scale = model.default_guidance_scale if self.guidance_scale is None else self.guidance_scale
            scale -= guiding.combination.convention == "text"  # the other convention's s is larger by one
        self.combination = replace(guiding.combination, scale=scale)
        if guiding.weighting is not None:
            self.weighting = guiding.weighting
        self.to(model.device)

    def distil(self, predictions: Predictions) -> Distilled:
        """One input, from predictions to a pull. Called under no_grad."""
        p = self.prepare(replace(predictions, combination=self.combination))
        p.ask(self.asked)
        residual = self.residual(p)
        with torch.enable_grad():
            loss = self.loss(p)
        return Distilled(residual, p.weight(self.weighting) * residual, loss)

    @property
    def asked(self) -> tuple[str, ...]:
        """All that the model is asked under."""
        return tuple(dict.fromkeys((*self.conditions, *self.combination.conditions)))

    def prepare(self, predictions: Predictions) -> Predictions:
        """Another input than the one that was drawn, or something to compare with; here there is no other.

        Called under no_grad, before the model was asked. Where `noisy` changes, `outputs` has to be a new dict.
        """
        return predictions

    @abstractmethod
    def residual(self, predictions: Predictions) -> Tensor:
        """[B, C, h, w]: minus the direction in which the model's input is to move; w(t) comes on top.

        Called under no_grad.
        """

    def guided(self, predictions: Predictions) -> Tensor:
        """[B, C, h, w]: the predictions under all conditions as one; here as the config says."""
        return predictions.combination(predictions.outputs, predictions.views)

    def error(self, predictions: Predictions) -> Tensor:
        """[B, C, h, w]: the noise that the guided prediction means, less `reference` or else the noise that was added.

        Where estimates of x are clamped, it is the noise that the clamped one means.
        """
        p, output = predictions, self.guided(predictions)
        if p.x0_range is None:
            if p.reference is None:
                return p.level.error(output, p.noisy, p.clean, p.noise)
            return p.level.noise(output, p.noisy) - p.reference
        estimate = p.level.clean(output, p.noisy).clamp(*p.x0_range)
        if p.reference is None:
            return p.level.error_of_clean(estimate, p.clean)
        return p.level.noise_of_clean(estimate, p.noisy) - p.reference

    def loss(self, predictions: Predictions) -> Tensor | None:
        """0-dim mean over the views, with a graph to every parameter; None: nothing is trained.

        Called with gradients enabled, after `residual`.
        """
        return None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trained parameters as groups for Adam, each with "params" and "lr"."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [{"params": parameters, "lr": self.learning_rate}] if parameters else []


@dataclass(frozen=True)
class Guiding:
    """What a config says to every method.

    Args:
        combination: its scale is not read.
        scale: s in the combination's convention; None: the method's own or else the model's.
        weighting: w(t); None: the method's own.
    """

    combination: Combination
    scale: float | None = None
    weighting: Weighting | None = None
