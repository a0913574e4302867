"""Score distillation that gives way to classifier score distillation in the course of a run."""

from __future__ import annotations

from torch import Tensor

from dreamfusion_fast.guidance.methods.csd import ClassifierScoreDistillation
from dreamfusion_fast.guidance.methods.method import Method, Predictions
from dreamfusion_fast.guidance.methods.sds import ScoreDistillationSampling


class MixedScoreDistillation(Method):
    """The residual of SDS by its share, and that of CSD by the rest."""

    def __init__(self) -> None:
        super().__init__()
        self._sds, self._csd = ScoreDistillationSampling(), ClassifierScoreDistillation()

    def residual(self, predictions: Predictions) -> Tensor:
        """See `Method.residual`."""
        share = predictions.sds_share
        if share in (0, 1):
            return (self._sds if share else self._csd).residual(predictions)
        return share * self._sds.residual(predictions) + (1 - share) * self._csd.residual(predictions)
