"""Rectified Flow Distillation Sampling (RFDS, Yang et al. 2024, arXiv 2406.03293): its first form, of random noise."""

from __future__ import annotations

from torch import Tensor

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance.contract import DiffusionModel
from dreamfusion_fast.guidance.methods.method import Guiding, Method, Predictions
from dreamfusion_fast.guidance.models.schedule import FlowLevel, FlowMatching, Weighting


class RectifiedFlowDistillation(Method):
    """v_hat - (n - x): the guided velocity less that of the straight line from the input x to the noise n.

    It is for flow-matching models. For these SDS, whose residual is the noise that v_hat means less n, is the same
    times 1 - sigma: both pull the same way, and SDS less at noisier levels. Weights w(t) come on top; the authors draw
    theirs at random, with one mean for all t, which "uniform" is nearest to.
    """

    weighting: Weighting = "uniform"

    def attach(self, model: DiffusionModel, guiding: Guiding) -> None:
        """See `Method.attach`."""
        if not isinstance(model.schedule, FlowMatching):
            raise UserError(
                f"guidance mode rfds: {model.name!r} is no flow-matching model, such as stable-diffusion-3.5-medium: "
                "use mode sds"
            )
        super().attach(model, guiding)

    def residual(self, predictions: Predictions) -> Tensor:
        """See `Method.residual`."""
        p, level = predictions, predictions.level
        assert isinstance(level, FlowLevel)
        return level.velocity_error(self.guided(p), p.clean, p.noise)
