"""Classifier Score Distillation (Yu et al. 2023, arXiv 2310.19415)."""

from __future__ import annotations

from torch import Tensor

from dreamfusion_fast.guidance.methods.method import Method, Predictions


class ClassifierScoreDistillation(Method):
    """s (eps_text - eps_null): what the text changes, without the pull towards any likely image.

    With a negative prompt eps_null is that prompt's: its pull is away from it. There is no whole prediction here, so
    that rescaled guidance has nothing to rescale.
    """

    def residual(self, predictions: Predictions) -> Tensor:
        """See `Method.residual`."""
        p = predictions
        noises = {name: p.level.noise(output, p.noisy) for name, output in p.outputs.items()}
        return p.scale * p.combination.direction(noises, p.views)
