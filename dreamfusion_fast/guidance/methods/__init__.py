"""Distillation methods: from a model's predictions to the pull on its input."""

from dreamfusion_fast.guidance.methods.combination import Combination
from dreamfusion_fast.guidance.methods.csd import ClassifierScoreDistillation
from dreamfusion_fast.guidance.methods.ism import IntervalScoreMatching, IsmConfig
from dreamfusion_fast.guidance.methods.method import Distilled, Guiding, Method, Predictions
from dreamfusion_fast.guidance.methods.mixed import MixedDistillation
from dreamfusion_fast.guidance.methods.sdi import ScoreDistillationViaInversion, SdiConfig
from dreamfusion_fast.guidance.methods.sds import ScoreDistillationSampling
from dreamfusion_fast.guidance.methods.vsd import VariationalScoreDistillation, VsdConfig

__all__ = [
    "ClassifierScoreDistillation",
    "Combination",
    "Distilled",
    "Guiding",
    "IntervalScoreMatching",
    "IsmConfig",
    "Method",
    "MixedDistillation",
    "Predictions",
    "ScoreDistillationSampling",
    "ScoreDistillationViaInversion",
    "SdiConfig",
    "VariationalScoreDistillation",
    "VsdConfig",
]
