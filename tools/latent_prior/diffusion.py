"""Training of the U-Net: v-prediction (Salimans and Ho 2022, arXiv 2202.00512), as of the embedded prior."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dreamfusion_fast.guidance.models.embedded.model import TRAIN_TIMESTEPS

from .networks import Precision

BINS = 10
COLUMNS = tuple(f"t{b / BINS:.1f}" for b in range(BINS))


def v_errors(
    unet: nn.Module,
    latents: Tensor,
    noise: Tensor,
    timestep: Tensor,
    tokens: Tensor,
    alphas_cumprod: Tensor,
    precision: Precision,
) -> Tensor:
    """Mean square error of v for each sample, `[n]` float32.

    Args:
        latents, noise: `[n, 4, 16, 16]`, scaled latents and standard normal noise.
        timestep: `[n]` int64.
        tokens: `[n, 20, 384]`.
        alphas_cumprod: `[1000]`.
    """
    abar = alphas_cumprod[timestep].view(-1, 1, 1, 1)
    noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    target = abar.sqrt() * noise - (1 - abar).sqrt() * latents
    with precision():
        prediction = unet(noisy, timestep, tokens, return_dict=False)[0]
    return (prediction.float() - target).square().flatten(1).mean(1)


def training_loss(
    unet: nn.Module, latents: Tensor, tokens: Tensor, alphas_cumprod: Tensor, precision: Precision
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and sums and counts of the unweighted errors in ten ranges of noise.

    As with the embedded prior: no timestep below 0.02, little weight below 0.15, where the task is noise. Min-SNR
    (Hang et al. 2023) is not used, since it takes its weight from high noise, where distillation finds the shape.
    """
    n, device = len(latents), latents.device
    timestep = torch.randint(int(0.02 * TRAIN_TIMESTEPS), TRAIN_TIMESTEPS, (n,), device=device)
    errors = v_errors(unet, latents, torch.randn_like(latents), timestep, tokens, alphas_cumprod, precision)
    weight = (timestep / (0.15 * TRAIN_TIMESTEPS)).clamp(max=1.0)
    sums, counts = torch.zeros(2, BINS, device=device)
    index = timestep * BINS // TRAIN_TIMESTEPS
    sums = sums.index_add(0, index, errors.detach())
    counts = counts.index_add(0, index, torch.ones_like(errors))
    return (errors * weight).mean(), sums, counts
