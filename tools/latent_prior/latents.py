"""Latents to train on: many pictures encoded ahead, and some of them made anew all the time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from prior_data.batches import CatalogueSampler, Parts
from torch import Tensor
from training_loop import seed_step

from dreamfusion_fast.guidance.models.embedded.model import ViewCondition

from .networks import LATENT_CHANNELS, LATENT_SIZE
from .text import FolderTextEncoder

_STREAM, _SCALE_STREAM = 7, 6


def make_sampler(data: Path, text_encoder: Path, device: torch.device) -> CatalogueSampler:
    """The embedded prior's pictures and captions, the captions encoded as a diffusers pipeline does.

    Raises:
        ValueError: a folder that lacks what is read.
    """
    for name, folder, files in (
        ("data", data, ("albedo.bin", "normal.bin", "views.npz", "models.json")),
        ("text-encoder", text_encoder, ("text_encoder.safetensors.gz", "tokenizer.json")),
    ):
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise ValueError(f"{name}: {folder} has no {', '.join(missing)}")
    return CatalogueSampler(data, FolderTextEncoder.from_package(text_encoder), device)


def measure_scale(
    sampler: CatalogueSampler, encode: Callable[[Tensor], Tensor], seed: int, count: int = 8192, at_once: int = 512
) -> float:
    """1 / standard deviation of the latents, as `scaling_factor` of diffusers' autoencoders is meant."""
    latents = []
    for index, first in enumerate(range(0, count, at_once)):
        seed_step(seed, _SCALE_STREAM, index)
        latents.append(encode(sampler.pictures(*sampler.draw(min(at_once, count - first)))[0]))
    return 1.0 / torch.cat(latents).std().item()


class LatentPool:
    """A ring of blocks of latents; one block after another is replaced by new pictures.

    Light, shading, colour and background belong to a latent; phrase, view word and dropped captions are drawn anew each
    time it is used. What a pool holds is a function of seed and step, so that it need not be stored.

    Args:
        encode: images in [-1, 1] to scaled latents.
        size: number of latents, rounded up to whole blocks.
        block: size of a block.
        renew_every: steps after which one more block is replaced.
    """

    def __init__(
        self,
        sampler: CatalogueSampler,
        encode: Callable[[Tensor], Tensor],
        seed: int,
        size: int = 2**19,
        block: int = 4096,
        renew_every: int = 64,
    ) -> None:
        if size < 1 or block < 1 or renew_every < 1:
            raise ValueError(f"size, block and renew_every must be at least 1, got {size}, {block}, {renew_every}")
        self._sampler, self._encode, self._seed = sampler, encode, seed
        self._block, self._renew_every = min(block, size), renew_every
        self._blocks = -(-size // self._block)
        count, device = self._blocks * self._block, sampler.device
        half = torch.float16 if device.type == "cuda" else torch.float32
        self.latents = torch.empty(count, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, dtype=half, device=device)
        self.model, self.word = (torch.empty(count, dtype=torch.long, device=device) for _ in range(2))
        self.azimuth, self.elevation = (torch.empty(count, device=device) for _ in range(2))
        self._generations: list[int] = [-1] * self._blocks

    def at(self, step: int) -> None:
        """Bring every block to what it is at this step. Reseeds torch where a block is made."""
        renewed = step // self._renew_every
        for index in range(self._blocks):
            # Block 0 is replaced first, then block 1, and after the last block 0 again.
            generation = (renewed + self._blocks - 1 - index) // self._blocks
            if self._generations[index] != generation:
                self._fill(index, generation)

    @torch.no_grad()
    def _fill(self, index: int, generation: int) -> None:
        seed_step(self._seed, _STREAM, generation * self._blocks + index)
        model, view = self._sampler.draw(self._block)
        images, parts = self._sampler.pictures(model, view)
        rows = slice(index * self._block, (index + 1) * self._block)
        self.latents[rows] = torch.cat([self._encode(part) for part in images.split(1024)]).to(self.latents.dtype)
        self.model[rows], self.word[rows] = model, parts.word
        self.azimuth[rows], self.elevation[rows] = self._sampler.azimuth[view], self._sampler.elevation[view]
        self._generations[index] = generation

    def batch(self, n: int) -> tuple[Tensor, Tensor]:
        """Latents `[n, 4, 16, 16]` float32 and token states `[n, 20, 384]` float32 of their captions."""
        chosen = torch.randint(len(self.latents), (n,), device=self.latents.device)
        azimuth, elevation = self.azimuth[chosen], self.elevation[chosen]
        phrase, suffix, null = self._sampler.captions(self.model[chosen], azimuth, elevation)
        parts = Parts(phrase, self.word[chosen], suffix, null, ViewCondition(azimuth, elevation))
        return self.latents[chosen].float(), caption_tokens(self._sampler, parts)


def caption_tokens(sampler: CatalogueSampler, parts: Parts) -> Tensor:
    """Token states `[n, 20, 384]` float32 of the parts' captions."""
    return sampler.tokens[sampler.caption_index(parts)].float()
