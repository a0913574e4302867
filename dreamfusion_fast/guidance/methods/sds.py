"""Score Distillation Sampling (DreamFusion, Poole et al. 2022, arXiv 2209.14988, equation 3)."""

from __future__ import annotations

from torch import Tensor

from dreamfusion_fast.guidance.methods.method import Method, Predictions


class ScoreDistillationSampling(Method):
    """eps_hat - eps, with eps_hat of the guided predictions."""

    def residual(self, predictions: Predictions) -> Tensor:
        """See `Method.residual`. Where estimates of x are clamped, eps_hat is that of the clamped one."""
        return self.error(predictions)
