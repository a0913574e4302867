"""Classifier Score Distillation (Yu et al. 2023, arXiv 2310.19415)."""

from __future__ import annotations

from torch import Tensor

from dreamfusion_fast.guidance.methods.method import Method, Predictions


class ClassifierScoreDistillation(Method):
    """s (eps_text - eps_null): what the text changes, without the pull towards any likely image."""

    def residual(self, predictions: Predictions) -> Tensor:
        """See `Method.residual`."""
        p = predictions
        null, text = (p.level.noise(p.outputs[name], p.noisy) for name in ("null", "text"))
        return p.scale * (text - null)
