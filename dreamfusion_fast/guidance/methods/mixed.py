"""Two methods, of which one gives way to the other in the course of a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dreamfusion_fast.guidance.contract import DiffusionModel
from dreamfusion_fast.guidance.methods.method import Distilled, Guiding, Method, Predictions


class MixedDistillation(Method):
    """The pull of one method by its share (`Predictions.sds_share`), and that of another by the rest.

    A method whose share is 0 is left out, unless it trains something, which goes on in all steps. Both see the same
    noise, and what both ask of the model about the same input is asked once.
    """

    def __init__(self, first: Method, second: Method) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.conditions = tuple(dict.fromkeys((*first.conditions, *second.conditions)))
        self.draws = max(first.draws, second.draws)

    def attach(self, model: DiffusionModel, guiding: Guiding) -> None:
        """See `Method.attach`."""
        for method in (self.first, self.second):
            method.attach(model, guiding)
        self.combination = self.first.combination

    def distil(self, predictions: Predictions) -> Distilled:
        """See `Method.distil`."""
        share, parts = predictions.sds_share, []
        for method, own in ((self.first, share), (self.second, 1 - share)):
            if own or any(parameter.requires_grad for parameter in method.parameters()):
                parts.append((own, method))
        if all(type(method).prepare is Method.prepare for _, method in parts):
            predictions.ask(tuple(dict.fromkeys(name for _, method in parts for name in method.asked)))
        done = [(own, method.distil(predictions)) for own, method in parts]
        losses = [distilled.loss for _, distilled in done if distilled.loss is not None]
        with torch.enable_grad():
            loss = torch.stack(losses).sum() if losses else None
        return Distilled(
            _total([(own, distilled.residual) for own, distilled in done]),
            _total([(own, distilled.pull) for own, distilled in done]),
            loss,
        )

    def residual(self, predictions: Predictions) -> Tensor:
        """See `Method.residual`."""
        return self.distil(predictions).residual


def _total(parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Sum of tensors by their shares; the only one is not multiplied."""
    parts = [(share, value) for share, value in parts if share]
    if len(parts) == 1:
        return parts[0][1]
    first, second = (share * value for share, value in parts)
    return first + second
