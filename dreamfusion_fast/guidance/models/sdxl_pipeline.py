"""SDXL as guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dreamfusion_fast.guidance.config import GuidanceConfig
from dreamfusion_fast.guidance.models.pipeline_source import PipelineSource
from dreamfusion_fast.guidance.models.pipelines import LatentModel


class SDXLModel(LatentModel):
    """SDXL's base model (Podell et al. 2023): two text encoders, and a U-Net that is told of sizes and cropping.

    It is told that the picture was of the model's own size and not cropped, as diffusers does where nobody says else.
    """

    _components = (*LatentModel._components, "text_encoder_2", "tokenizer_2")
    _text_suffixes = ("", "_2")
    _condition_names = ("hidden", "pooled")
    _added_conditions = ("text_time",)
    _may_upcast = True
    _tiny_autoencoder = "madebyollin/taesdxl"

    def __init__(self, source: PipelineSource, config: GuidanceConfig, device: torch.device):
        super().__init__(source, config, device)
        # Original height and width, top and left of the crop, target height and width.
        sizes = (self.image_size, self.image_size, 0, 0, self.image_size, self.image_size)
        self._time_ids = torch.tensor([sizes], dtype=self.dtype, device=device)
        per_number = self._network_config.get("addition_time_embed_dim")
        wanted = self._network_config.get("projection_class_embeddings_input_dim")
        if not isinstance(per_number, int) or not isinstance(wanted, int):
            raise self._source.error(
                "the unet's configuration lacks addition_time_embed_dim or "
                "projection_class_embeddings_input_dim, which SDXL has"
            )
        room = wanted - per_number * len(sizes)
        if self._text.pooled_width != room:
            raise self._source.error(
                f"text_encoder_2 gives pooled vectors of width {self._text.pooled_width}, the "
                f"unet reads width {room} beside {len(sizes)} numbers: they were not made for each other"
            )

    def _unet_arguments(self, condition: Mapping[str, Tensor]) -> dict[str, Any]:
        pooled = condition["pooled"].to(self.dtype)
        added = {"text_embeds": pooled, "time_ids": self._time_ids.expand(len(pooled), -1)}
        return {**super()._unet_arguments(condition), "added_cond_kwargs": added}
