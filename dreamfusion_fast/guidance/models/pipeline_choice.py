"""Which of the models here a diffusers pipeline is."""

from __future__ import annotations

import torch

from dreamfusion_fast.errors import UserError, one_line
from dreamfusion_fast.guidance.config import GuidanceConfig
from dreamfusion_fast.guidance.models.flow_pipelines import FLOW_MODELS
from dreamfusion_fast.guidance.models.pipeline_origins import open_source
from dreamfusion_fast.guidance.models.pipeline_source import PipelineSource
from dreamfusion_fast.guidance.models.pipelines import SERVED, LatentModel, PipelineModel, PixelModel
from dreamfusion_fast.guidance.models.sdxl_pipeline import SDXLModel


def load_pipeline_model(config: GuidanceConfig, device: torch.device) -> PipelineModel:
    """The diffusion model of a diffusers pipeline, its configurations checked, its weights not loaded yet.

    Raises:
        UserError: the name leads nowhere, or to a pipeline that cannot guide; the message says what is missing.
    """
    source = open_source(config)
    with source.faults("its configuration describes no pipeline that can guide"):
        model = _model_class(source)(source, config, device)
        model.try_out()
        source.open_additions(config)
    source.warn_of_adapters()
    model.files = {**source.files, **model.elsewhere}
    return model


def _model_class(source: PipelineSource) -> type[PipelineModel]:
    kind = source.kind
    if source.class_name("unet") is None:
        transformer = source.class_name("transformer")
        if transformer in FLOW_MODELS:
            return FLOW_MODELS[transformer]
        if transformer is not None:
            raise source.error(f"{kind} has a transformer of class {one_line(transformer, 60)}: {SERVED}")
        others = [part for part in ("prior", "safety_checker") if source.class_name(part) is not None]
        held = f"only {', '.join(others)}" if others else "none"
        raise UserError(f"guidance {source.name!r} ({kind}) has no unet or transformer, {held}: {SERVED}")
    if source.class_name("text_encoder_2") is not None:
        if source.class_name("text_encoder") is None:
            raise UserError(
                f"guidance {source.name!r} ({kind}) has a text_encoder_2 alone, as SDXL's refiner does, which only "
                "improves pictures of the base model: name the base model"
            )
        return SDXLModel
    # A Stable Diffusion pipeline without its vae is a latent model that lacks something, not a pixel model.
    if source.class_name("vae") is not None or kind.startswith("StableDiffusion"):
        return LatentModel
    return PixelModel
