"""The interface of a distillation method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dreamfusion_fast.guidance.contract import DiffusionModel, PromptEmbeddings, Views
from dreamfusion_fast.guidance.methods.cfg import Convention, guided
from dreamfusion_fast.guidance.models.schedule import NoiseLevel


@dataclass(eq=False)
class Predictions:
    """A model's answers to one noisy input, under several conditions, and what it takes to ask again.

    Attributes:
        model, embeddings: who answers, and the prompts.
        views: B of them.
        t: [B] int64.
        clean, noise, noisy: [B, C, h, w], the input x, the noise n, and x_t of both.
        level: the noise level of each view.
        scale, convention: of classifier-free guidance.
        x0_range: what estimates of x are clamped to; None: they are not.
        sds_share: see `GuidanceRequest`.
        outputs: condition -> [B, C, h, w], as the model gave them under the method's conditions, without a graph.
    """

    model: DiffusionModel
    embeddings: PromptEmbeddings
    views: Views
    t: Tensor
    clean: Tensor
    noise: Tensor
    noisy: Tensor
    level: NoiseLevel
    scale: float
    convention: Convention = "null"
    x0_range: tuple[float, float] | None = None
    sds_share: float = 1.0
    outputs: Mapping[str, Tensor] = field(default_factory=dict)

    def predict(self, conditions: Sequence[str]) -> dict[str, Tensor]:
        """Ask the model: condition -> [B, C, h, w] in the dtype of `noisy`, with a graph if gradients are enabled."""
        rows = self.embeddings.select(conditions, self.views)
        outputs = self.model.predict(self.noisy, self.t, rows, self.views).to(self.noisy.dtype)
        return dict(zip(conditions, outputs.chunk(len(conditions)), strict=True))


class Method(nn.Module, ABC):
    """A rule that turns predictions into a pull.

    It may have parameters of its own and a loss that trains them, as the LoRA of variational score distillation. They
    are on the model's device, and its `state_dict` is in the checkpoints of a run.

    Attributes:
        conditions: what the model is asked under: "null" (the negative prompt), "text" (the prompt with the direction
            of each view), or the prompt with one direction of `VIEW_NAMES` for all views.
        learning_rate: of its parameters, in all steps.
    """

    conditions: tuple[str, ...] = ("null", "text")
    learning_rate = 1e-4

    def check(self, model: DiffusionModel) -> None:
        """Raise UserError for a model that the method cannot distil; here none. Nothing is loaded yet."""
        return

    @abstractmethod
    def residual(self, predictions: Predictions) -> Tensor:
        """[B, C, h, w]: minus the direction in which the model's input is to move; the caller weights it by w(t).

        Called under no_grad.
        """

    def guided(self, predictions: Predictions) -> Tensor:
        """[B, C, h, w]: the predictions under all conditions as one; here by classifier-free guidance."""
        p = predictions
        return guided(p.outputs["null"], p.outputs["text"], p.scale, p.convention)

    def loss(self, predictions: Predictions) -> Tensor | None:
        """0-dim mean over the views, with a graph to every parameter; None: nothing is trained.

        Called with gradients enabled, after `residual`.
        """
        return None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trained parameters as groups for Adam, each with "params" and "lr"."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [{"params": parameters, "lr": self.learning_rate}] if parameters else []
