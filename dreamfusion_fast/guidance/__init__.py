"""Guidance, which pulls images towards a prompt: one distillation for all models and methods."""

from dreamfusion_fast.guidance.config import KNOWN_GUIDANCE, GuidanceConfig
from dreamfusion_fast.guidance.contract import (
    DiffusionModel,
    Guidance,
    GuidanceOutput,
    GuidanceRequest,
    PromptEmbeddings,
    Views,
)
from dreamfusion_fast.guidance.creation import create_guidance, create_model
from dreamfusion_fast.guidance.distillation import ScoreDistillation
from dreamfusion_fast.guidance.methods import Method
from dreamfusion_fast.guidance.models.schedule import NoiseLevel, NoiseSchedule, VariancePreserving
from dreamfusion_fast.guidance.prompts import VIEW_NAMES, Prompt, PromptSet, view_index

__all__ = [
    "KNOWN_GUIDANCE",
    "VIEW_NAMES",
    "DiffusionModel",
    "Guidance",
    "GuidanceConfig",
    "GuidanceOutput",
    "GuidanceRequest",
    "Method",
    "NoiseLevel",
    "NoiseSchedule",
    "Prompt",
    "PromptEmbeddings",
    "PromptSet",
    "ScoreDistillation",
    "VariancePreserving",
    "Views",
    "create_guidance",
    "create_model",
    "view_index",
]
