"""From a config to the guidance that it names."""

from __future__ import annotations

import torch

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance.config import GuidanceConfig, is_prior
from dreamfusion_fast.guidance.contract import DiffusionModel, Guidance
from dreamfusion_fast.guidance.distillation import ScoreDistillation
from dreamfusion_fast.io import user_path


def create_guidance(config: GuidanceConfig, device: torch.device | str = "cpu") -> Guidance:
    """Build the guidance a config names.

    Raises:
        UserError: unknown name, a folder that is no pipeline, a hub id that cannot be had, a device that is absent.
    """
    return ScoreDistillation(create_model(config, device), config)


def create_model(config: GuidanceConfig, device: torch.device | str = "cpu") -> DiffusionModel:
    """The diffusion model a config names; raises as `create_guidance` does."""
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device} was asked for, but this machine has no usable GPU: use device cpu")
    # Imported here: diffusers and transformers take seconds to import.
    if is_prior(config.name):
        from dreamfusion_fast.guidance.models.embedded.guide import EmbeddedPrior

        own = {} if config.name == "embedded" else {"folder": user_path(config.name, "guidance")}
        return EmbeddedPrior(device, config.dtype, fused=config.fused, **own)

    from dreamfusion_fast.guidance.models.pipeline_choice import load_pipeline_model

    return load_pipeline_model(config, device)
