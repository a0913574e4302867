"""The autoencoder, the U-Net and the noise schedule, all of diffusers' own classes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from dreamfusion_fast.guidance.models.embedded.model import TRAIN_TIMESTEPS
from dreamfusion_fast.guidance.models.embedded.text_encoder import WIDTH

IMAGE_SIZE = 64
LATENT_CHANNELS = 4
LATENT_SIZE = 16


@dataclasses.dataclass(frozen=True)
class Shape:
    """Widths of the networks.

    The default has 0.29 M weights in the encoder, 0.46 M in the decoder and 3.0 M in the U-Net.

    Args:
        vae_channels: of the autoencoder at 64, 32 and 16 pixels.
        unet_channels: of the U-Net at 16, 8 and 4 pixels.
        groups: of every group norm. With few channels in a group the autoencoder loses sight of plain colours, which a
            norm over one channel removes.
        heads: of every attention of the U-Net.

    Raises:
        ValueError: not three widths each, or widths that groups and heads do not divide.
    """

    vae_channels: tuple[int, ...] = (24, 40, 64)
    unet_channels: tuple[int, ...] = (48, 72, 96)
    groups: int = 8
    heads: int = 4

    def __post_init__(self) -> None:
        for name in ("vae_channels", "unet_channels"):
            widths = getattr(self, name)
            if len(widths) != 3 or any(w < 1 or w % self.groups for w in widths):
                raise ValueError(f"{name} must be three multiples of {self.groups} (groups), got {widths}")
        if any(w % self.heads for w in self.unet_channels):
            raise ValueError(f"unet_channels must be multiples of {self.heads} (heads), got {self.unet_channels}")


def make_autoencoder(shape: Shape) -> Any:
    """`AutoencoderKL`: RGB `[n, 3, 64, 64]` in [-1, 1] to latents `[n, 4, 16, 16]` and back; random weights."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=shape.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=shape.groups,
        latent_channels=LATENT_CHANNELS,
        sample_size=IMAGE_SIZE,
        force_upcast=False,
    )


def make_unet(shape: Shape) -> Any:
    """`UNet2DConditionModel` over the latents, of Stable Diffusion's kind of blocks; random weights.

    Text reaches it by cross attention alone, at 16 and 8 pixels and in the middle.
    """
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=shape.unet_channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=shape.heads,  # in diffusers the number of heads, whatever it is called
        norm_num_groups=shape.groups,
        use_linear_projection=True,
    )


def make_scheduler() -> Any:
    """Cosine schedule (Nichol and Dhariwal 2021), v-prediction; latents are not clamped."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,  # which diffusers' Stable Diffusion pipelines want to read; trailing steps do not use it
        timestep_spacing="trailing",
    )


class Autoencoding(nn.Module):
    """Images there and back through a sample of the posterior, in one call that can be compiled.

    `forward(images, noise)`: images `[n, 3, 64, 64]`, noise `[n, 4, 16, 16]` standard normal; returns the
    reconstruction, and mean and log variance of the posterior `[n, 4, 16, 16]`.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.vae.quant_conv(self.vae.encoder(images)).chunk(2, 1)
        # The range in which diffusers' DiagonalGaussianDistribution holds it.
        log_variance = log_variance.float().clamp(-30.0, 20.0)
        latent = mean + (0.5 * log_variance).exp() * noise
        return self.vae.decoder(self.vae.post_quant_conv(latent)), mean, log_variance


class Precision:
    """bfloat16 arithmetic by autocast, or none.

    Args:
        device: of the tensors.
        bfloat16: whether matrix products and convolutions run in it; weights stay float32.
    """

    def __init__(self, device: torch.device, bfloat16: bool) -> None:
        self._device, self._bfloat16 = device.type, bfloat16

    def __call__(self) -> torch.autocast:
        return torch.autocast(self._device, torch.bfloat16, enabled=self._bfloat16)
