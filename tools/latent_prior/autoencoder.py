"""Training of the autoencoder: absolute error, error of the edges, and a little Kullback-Leibler divergence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .networks import LATENT_CHANNELS, LATENT_SIZE, Precision

COLUMNS = ("l1", "edges", "kl")
EDGE_WEIGHT = 1.0
# Of the divergence in nats per image, beside an error that is a mean over pixels. Large enough that latents stay of
# about unit size and neighbouring ones decode alike, small enough to cost no sharpness.
KL_WEIGHT = 1e-6


def terms(autoencoding: nn.Module, images: Tensor, precision: Precision) -> Tensor:
    """Mean absolute error, that of the differences of neighbouring pixels, and the divergence per image.

    Args:
        autoencoding: called as `networks.Autoencoding` is.
        images: `[n, 3, 64, 64]` in [-1, 1].

    Returns:
        `[3]` float32.
    """
    noise = torch.randn(len(images), LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, device=images.device)
    with precision():
        output, mean, log_variance = autoencoding(images, noise)
    error, mean = output.float() - images, mean.float()
    # The difference of differences is the difference of the error.
    edges = 0.5 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    return torch.stack([error.abs().mean(), edges, divergence.flatten(1).sum(1).mean()])


def total(parts: Tensor) -> Tensor:
    """The loss of `terms`."""
    return parts[0] + EDGE_WEIGHT * parts[1] + KL_WEIGHT * parts[2]


@torch.no_grad()
def encode(vae: Any, images: Tensor, precision: Precision) -> Tensor:
    """Means of the posterior `[n, 4, 16, 16]` float32, not scaled: what `LatentModel` takes as latents, too."""
    with precision():
        return vae.encode(images).latent_dist.mean.float()


@torch.no_grad()
def decode(vae: Any, latents: Tensor, precision: Precision) -> Tensor:
    """Images `[n, 3, 64, 64]` float32 of latents that are not scaled."""
    with precision():
        return vae.decode(latents, return_dict=False)[0].float()


def psnr(images: Tensor, other: Tensor) -> float:
    """Peak signal to noise ratio in dB, images in [-1, 1]."""
    return (-10 * (images - other).div(2).square().mean().log10()).item()
