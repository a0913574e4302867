"""Guidance for tests of memory: draws noise as score distillation does, and runs out of memory when told."""

from __future__ import annotations

from typing import Any

import torch
from fakes import BallGuidance, target
from torch import Tensor

from dreamfusion_fast.guidance.contract import DiffusionModel, GuidanceOutput, GuidanceRequest
from dreamfusion_fast.guidance.memory import GuidanceMemory
from dreamfusion_fast.guidance.models.schedule import VariancePreserving
from dreamfusion_fast.guidance.prompts import Prompt


class NoisyGuidance(BallGuidance):
    """A pull towards the ball with noise per view, drawn for the whole batch; notes how many views each call had."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.recompute = False
        self.freed = 0

    def memory_needs(self, batch: int, render_size: int) -> GuidanceMemory:
        return GuidanceMemory(encode=2, encode_recomputed=1)

    def free_graphs(self) -> None:
        self.freed += 1

    def set_recompute(self, on: bool) -> None:
        self.recompute = on

    def before(self, views: int) -> None:
        """Called first in each call; a test may raise here."""

    def gradient(self, request: GuidanceRequest) -> GuidanceOutput:
        images, batch = request.images.detach(), len(request.images)
        t = torch.randint(0, 1000, (batch,), generator=request.generator)
        noise = torch.randn(images.shape, generator=request.generator)
        step = request.views_per_call or batch
        for first in range(0, batch, step):
            self.sizes.append(min(step, batch - first))
            self.before(self.sizes[-1])
        pull = images - target(request.views, images.shape[-1]) + 0.1 * noise
        return GuidanceOutput(pull, t, pull.square().flatten(1).mean(dim=1).sqrt())


class TinyLatentModel(DiffusionModel):
    """An autoencoder and a U-Net of one convolution each; latents are an eighth as wide as images."""

    name = "tiny latents"
    default_guidance_scale = 7.5
    text_identity = "none"

    def __init__(self, image_size: int = 16) -> None:
        self.device = torch.device("cpu")
        self.image_size = image_size
        self.schedule = VariancePreserving(torch.linspace(0.999, 0.01, 1000), "epsilon")
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self._encoder = torch.nn.Conv2d(3, 4, 8, stride=8).requires_grad_(False)
            self._unet = torch.nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)

    def embed_texts(self, texts: list[Prompt]) -> dict[str, Tensor]:
        return {"hidden": torch.arange(len(texts))[:, None].float() / len(texts)}

    def encode(self, images: Tensor) -> Tensor:
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = torch.nn.functional.interpolate(images, size, mode="bilinear", align_corners=False)
        return self._encoder(images * 2 - 1)

    def predict(self, noisy: Tensor, t: Tensor, condition: Any, views: Any) -> Tensor:
        return (
            self._unet(noisy.repeat(len(condition["hidden"]) // len(noisy), 1, 1, 1))
            + condition["hidden"][:, :, None, None]
        )
