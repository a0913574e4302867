"""Guidance, which pulls images towards a prompt: one SDS, and diffusion models behind one small interface."""

from dreamfusion_fast.guidance.config import KNOWN_GUIDANCE, GuidanceConfig
from dreamfusion_fast.guidance.contract import DiffusionModel, Guidance, PromptEmbeddings, SDSOutput, Views
from dreamfusion_fast.guidance.creation import create_guidance
from dreamfusion_fast.guidance.distillation import ScoreDistillation
from dreamfusion_fast.guidance.models.schedule import NoiseLevel, NoiseSchedule, VariancePreserving
from dreamfusion_fast.guidance.prompts import VIEW_NAMES, Prompt, PromptSet, view_index

__all__ = [
    "KNOWN_GUIDANCE",
    "VIEW_NAMES",
    "DiffusionModel",
    "Guidance",
    "GuidanceConfig",
    "NoiseLevel",
    "NoiseSchedule",
    "Prompt",
    "PromptEmbeddings",
    "PromptSet",
    "SDSOutput",
    "ScoreDistillation",
    "VariancePreserving",
    "Views",
    "create_guidance",
    "view_index",
]
