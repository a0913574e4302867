"""Distillation methods: from a model's predictions to the pull on its input."""

from dreamfusion_fast.guidance.methods.csd import ClassifierScoreDistillation
from dreamfusion_fast.guidance.methods.method import Method, Predictions
from dreamfusion_fast.guidance.methods.mixed import MixedScoreDistillation
from dreamfusion_fast.guidance.methods.rfds import RectifiedFlowDistillation
from dreamfusion_fast.guidance.methods.sds import ScoreDistillationSampling

__all__ = [
    "ClassifierScoreDistillation",
    "Method",
    "MixedScoreDistillation",
    "Predictions",
    "RectifiedFlowDistillation",
    "ScoreDistillationSampling",
]
