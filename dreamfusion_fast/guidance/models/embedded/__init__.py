"""The embedded prior: a small text-to-image diffusion model that ships with the package and knows a few hundred things.

Nothing here imports diffusers, which takes seconds, except to draw pictures (`sample`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from dreamfusion_fast.guidance.config import GuidanceConfig
    from dreamfusion_fast.guidance.contract import DiffusionModel


def create_prior(config: GuidanceConfig, device: torch.device) -> DiffusionModel:
    """The embedded prior as a guidance model; see `dreamfusion_fast.guidance.models.embedded.guide.EmbeddedPrior`."""
    from .guide import EmbeddedPrior

    return EmbeddedPrior(device, config.dtype, fused=config.fused)
