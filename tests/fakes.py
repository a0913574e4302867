"""Stand-ins that keep tests of whole runs small: a guidance that wants a coloured ball, a prior of a few weights."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamfusion_fast.export import agreement, seen
from dreamfusion_fast.fields.hash_field import HashGridFieldConfig
from dreamfusion_fast.fields.triplane_field import TriplaneFieldConfig
from dreamfusion_fast.guidance.contract import Guidance, GuidanceOutput, GuidanceRequest, PromptEmbeddings, Views
from dreamfusion_fast.networks.plane_transformer import PlaneTransformerConfig
from dreamfusion_fast.rendering import RendererConfig
from dreamfusion_fast.training.amortised import AmortisedField, KnownCaptions, save_amortised
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.sections import (
    BackgroundConfig,
    ExportConfig,
    FirmConfig,
    LogConfig,
    OccupancyConfig,
    OptimConfig,
    ScheduleConfig,
)

RADIUS = 0.4  # of the wanted disc, as a share of half the image
COLOR = (0.8, 0.2, 0.1)


def small_config(**settings: Any) -> Config:
    """A run that takes milliseconds a step and writes little."""
    config = Config(
        prompt="a red ball",
        steps=12,
        batch=2,
        device="cpu",
        init="scratch",
        field=HashGridFieldConfig(levels=4, base_resolution=4, finest_resolution=32, log2_rows=12, hidden=16),
        renderer=RendererConfig(samples_across=48),
        occupancy=OccupancyConfig(resolution=16, every=4, warmup_steps=8),
        background=BackgroundConfig(plain=0.75, frequencies=2, hidden=8),
        optim=OptimConfig(warmup_steps=5),
        schedule=ScheduleConfig(render_size_start=12, render_size=16, render_size_until=0.5),
        log=LogConfig(preview_every=0, checkpoint_every=0, tensorboard=False, progress_bar=False),
        firm=FirmConfig(steps=3),
        export=ExportConfig(resolution=32, texture_size=64, turntable_frames=3, turntable_size=32, preview_views=2),
    )
    return dataclasses.replace(config, **settings)


def target(views: Views, size: int) -> Tensor:
    """The image that the guidance wants `[B, 3, size, size]`: a disc in one colour before the views' background."""
    axis = (torch.arange(size) + 0.5) * (2.0 / size) - 1.0
    disc = (axis[:, None].square() + axis.square() < RADIUS**2).float()
    background = torch.zeros(len(views), 3) if views.background is None else views.background.cpu()
    return disc * torch.tensor(COLOR)[:, None, None] + (1 - disc) * background[:, :, None, None]


class BallGuidance(Guidance):
    """Pulls images towards `target`, and notes what it was asked.

    Args:
        nan_at: the call, from 0, whose gradient is NaN.
        strength: of the pull; 0 for none.
    """

    name, image_size = "ball", 16

    def __init__(self, nan_at: int = -1, strength: float = 1.0) -> None:
        self.nan_at, self.strength = nan_at, strength
        self.calls: list[dict[str, Any]] = []

    def embed(self, prompts: Any) -> PromptEmbeddings:
        return PromptEmbeddings({"nothing": torch.zeros(PromptEmbeddings.ROWS, 1)})

    def gradient(self, request: GuidanceRequest) -> GuidanceOutput:
        images, views = request.images, request.views
        size = images.shape[-1]
        difference = images.detach() - target(views, size).to(images.device)
        gradient = self.strength * difference * (self.image_size / size) ** 2
        if len(self.calls) == self.nan_at:  # in the middle, since a ray in a corner meets nothing
            gradient[0, 0, images.shape[2] // 2, images.shape[3] // 2] = float("nan")
        arrived: dict[str, Any] = {"images": images.detach(), "gradient": gradient}
        arrived |= {"views": views, "t_range": request.t_range, "sds_share": request.sds_share}
        images.register_hook(lambda grad: arrived.update(image_grad=grad))
        self.calls.append(arrived)
        t = torch.randint(0, 1000, (len(images),), generator=request.generator)
        return GuidanceOutput(gradient, t, difference.square().flatten(1).mean(dim=1).sqrt())


def write_tiny_prior(folder: Path, views: int = 1) -> Path:
    """A folder as the package's weights are, with a network of random weights that takes milliseconds."""
    from dreamfusion_fast.guidance.models.embedded.model import UNET_CONFIG, PriorNetwork, save_prior
    from dreamfusion_fast.guidance.models.embedded.text_encoder import WEIGHTS

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("text_encoder.safetensors.gz", "tokenizer.json"):
        (folder / name).symlink_to(WEIGHTS / name)
    small = {"block_out_channels": (8, 8, 16), "norm_num_groups": 4, "attention_head_dim": 4}
    config = UNET_CONFIG | small | {"views": views}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = PriorNetwork(config)
    save_prior(network.state_dict(), network.config, folder / "prior.safetensors.gz", {"trained": "no"})
    return folder


def use_prior(folder: Path, patch: Any = None) -> None:
    """Let the package find its prior in `folder`; undone with `patch`, pytest's monkeypatch, if given."""
    from dreamfusion_fast.guidance.models.embedded import guide, sample

    found = functools.partial(guide.EmbeddedPrior, folder=folder)
    put = setattr if patch is None else patch.setattr
    put(guide, "EmbeddedPrior", found)
    put(sample, "EmbeddedPrior", found)


class WordVectors(torch.nn.Module):
    """Stands in for the embedded prior's `TextEncoder`: each word has a vector, a caption is the mean of its words'."""

    def forward(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        tokens = torch.zeros(len(captions), 20, 384)
        for row, caption in enumerate(captions):
            for place, word in enumerate(caption.replace(",", "").split()[:20]):
                generator = torch.Generator().manual_seed(zlib.crc32(word.encode()))
                # Articles say little.
                tokens[row, place] = torch.randn(384, generator=generator) * (0.1 if word in ("a", "an") else 1.0)
        pooled = torch.nn.functional.normalize(tokens.sum(dim=1), dim=1) * 384**0.5
        return tokens, pooled


AMORTISED_NETWORK = PlaneTransformerConfig(
    width=16, heads=2, blocks=1, tokens=3, patch=3, patch_features=4, features=4, code_width=5
)
AMORTISED_FIELD = TriplaneFieldConfig(resolution=9, features=4, hidden=16, blob_radius=0.75, mlp_dtype="auto")
AMORTISED_OBJECTS = {"armchair": [0], "chair": [0, 1, 2], "grand piano": [3]}


def look_small(patch: Any = None) -> None:
    """Let exports look at the object in pictures of 64^2, not 256^2; see `use_prior` for `patch`.

    For tests of runs. The quality of meshes is tested under `tests/export`, with pictures of the usual size.
    """
    put = setattr if patch is None else patch.setattr
    put(seen, "_SIZE", 64)
    put(agreement, "SIZE", 64)


def amortised_model() -> AmortisedField:
    """A network of random weights that makes planes in no time."""
    model = AmortisedField(AMORTISED_NETWORK, AMORTISED_FIELD, 4, torch.Generator().manual_seed(1))
    return model.eval().requires_grad_(False)


def amortised_captions(encoder: torch.nn.Module) -> KnownCaptions:
    """Its captions, as an encoder reads them."""
    vectors = encoder([f"a {phrase}" for phrase in AMORTISED_OBJECTS])[1]
    return KnownCaptions(AMORTISED_OBJECTS, vectors, ("red", "blue"), 0.72)


def write_amortised(path: Path) -> Path:
    """A file for `--init` of both, whose captions are read by `WordVectors`."""
    save_amortised(path, amortised_model(), amortised_captions(WordVectors()), {"steps": "7"})
    return path
