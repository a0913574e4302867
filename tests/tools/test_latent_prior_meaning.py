"""The latent prior that ships in `tools/latent_prior/weights`: its stored weights tell prompts apart."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

pytest.importorskip("diffusers")

import train_latent_prior
from latent_prior import looks
from latent_prior.networks import Precision
from latent_prior.pipeline import Pipeline

PROMPTS = ("a red car", "a cactus", "a blue sofa", "a table")
EACH = 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latent") / "prior"
    train_latent_prior.main(["pack", "--folder", str(folder)])
    return folder


@pytest.fixture(scope="module")
def prior(folder):
    return Pipeline(folder, CPU)


@pytest.fixture(scope="module")
def drawn(prior):
    """Images `[prompts, each, 3, 64, 64]` in [0, 1] of every prompt."""
    states = prior.encoder(["", *PROMPTS])[0]
    tokens = states[1:].repeat_interleave(EACH, 0)
    noise = torch.randn(len(tokens), 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = looks.sample(
            prior.vae, prior.unet, prior.scheduler, states[:1], tokens, noise, Precision(CPU, False), steps=15
        )
    return (images.view(len(PROMPTS), EACH, 3, 64, 64) + 1) / 2


@pytest.mark.slow
def test_the_colour_that_was_asked_for_stands_out(drawn):
    colours = drawn[..., 16:48, 16:48].mean((1, 3, 4))  # the middle, where the object is
    for prompt, channel in (("a red car", 0), ("a cactus", 1), ("a blue sofa", 2)):
        colour = colours[PROMPTS.index(prompt)]
        others = colour[[c for c in range(3) if c != channel]]
        assert colour[channel] > others.max() + 0.1, (prompt, colour.tolist())


@pytest.mark.slow
def test_a_picture_is_denoised_best_under_its_own_prompt(prior, drawn):
    """Diffusion models as classifiers: Li et al. 2023, Your Diffusion Model is Secretly a Zero-Shot Classifier."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        latents = prior.vae.encode(drawn.flatten(0, 1) * 2 - 1).latent_dist.mean * prior.vae.config.scaling_factor
        text = prior.encoder(list(PROMPTS))[0]
        losses = torch.zeros(len(latents), len(PROMPTS))
        for t in (500, 700, 800, 900):
            alphas = prior.scheduler.alphas_cumprod[t]
            noise = torch.randn(latents.shape, generator=generator)
            noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
            velocity = alphas.sqrt() * noise - (1 - alphas).sqrt() * latents
            for k in range(len(PROMPTS)):
                given = text[k : k + 1].expand(len(latents), -1, -1)
                output = prior.unet(noisy, t, encoder_hidden_states=given).sample
                losses[:, k] += (output - velocity).square().mean((1, 2, 3))
    own = torch.arange(len(PROMPTS)).repeat_interleave(EACH)
    assert (losses.argmin(1) == own).float().mean() >= 0.9, losses
