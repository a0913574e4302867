"""The embedded prior's network: a small pixel-space diffusion U-Net, told the caption and what a renderer knows.

Images are 64x64. The U-Net (`unet.PriorUNet`) works on 2x2 pixel-unshuffled input, so that its widest level is 32x32.
It predicts v (Salimans and Ho 2022, arXiv 2202.00512) under the cosine schedule (Nichol and Dhariwal 2021, arXiv
2102.09672). Beside the caption it can be given the camera, the background colour and the kind of shading, each behind a
flag that says whether it is known: a renderer knows them, and what the model need not guess it does not blur.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreamfusion_fast.guidance.config import PRIOR_FILE

from .quantize import load_network, save_weights
from .text_encoder import WEIGHTS, WIDTH
from .unet import PriorUNet

IMAGE_SIZE = 64
TRAIN_TIMESTEPS = 1000
SHADINGS = ("albedo", "lambertian", "textureless")
# A pooled caption has 384 entries of unit variance; the few entries of a view are scaled up to be heard beside it.
_VIEW_SCALE = 3.0
_CAMERA, _BACKGROUND, _SHADING = 7, 4, 1 + len(SHADINGS)
CONDITION_WIDTH = WIDTH + _CAMERA + _BACKGROUND + _SHADING

UNET_CONFIG: dict[str, Any] = {
    "sample_size": IMAGE_SIZE // 2,
    "in_channels": 12,
    "out_channels": 12,
    "block_out_channels": (128, 192, 224),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
    "use_linear_projection": True,
    "resnet_time_scale_shift": "scale_shift",
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": CONDITION_WIDTH,
}
"""diffusers' settings of the U-Net. A network has "views" beside them, 1 where a file does not say."""
MAX_VIEWS = 16
# What a network may have otherwise.
_FREE = {"sample_size", "block_out_channels", "attention_head_dim", "cross_attention_dim", "norm_num_groups"}


@dataclass
class ViewCondition:
    """The conditions of each image besides its caption; None leaves it to the model.

    Attributes:
        azimuth, elevation: `[n]` radians, 0 = front at eye level.
        background: `[n, 3]` colour in [0, 1].
        shading: `[n]` int64, index into `SHADINGS`.
        camera_known, background_known, shading_known: `[n]` bool; default: true where the values are given.
    """

    azimuth: Tensor | None = None
    elevation: Tensor | None = None
    background: Tensor | None = None
    shading: Tensor | None = None
    camera_known: Tensor | None = None
    background_known: Tensor | None = None
    shading_known: Tensor | None = None

    def vector(self, n: int, device: torch.device | str) -> Tensor:
        """`[n, 15]` float32: for camera, background and shading a flag and values, scaled; zeros where unknown."""
        out = torch.zeros(n, _CAMERA + _BACKGROUND + _SHADING, device=device)
        if self.azimuth is not None and self.elevation is not None:
            a, e = self.azimuth.float(), self.elevation.float()
            camera = torch.stack(
                [torch.ones_like(a), a.sin(), a.cos(), (2 * a).sin(), (2 * a).cos(), e.sin(), e.cos()], -1
            )
            out[:, :_CAMERA] = _masked(camera, self.camera_known)
        if self.background is not None:
            colour = torch.cat([torch.ones_like(self.background[:, :1]), self.background * 2 - 1], -1)
            out[:, _CAMERA : _CAMERA + _BACKGROUND] = _masked(colour, self.background_known)
        if self.shading is not None:
            kind = nn.functional.one_hot(self.shading, len(SHADINGS)).float()
            out[:, _CAMERA + _BACKGROUND :] = _masked(
                torch.cat([torch.ones_like(kind[:, :1]), kind], -1), self.shading_known
            )
        return out * _VIEW_SCALE


def _masked(values: Tensor, known: Tensor | None) -> Tensor:
    return values if known is None else values * known[:, None]


class PriorNetwork(nn.Module):
    """v-prediction for 64x64 images.

    `forward(noisy, timestep, tokens, condition)`:
        noisy: `[n, 3, 64, 64]`, x_t with x in [-1, 1].
        timestep: `[n]` int64 or float, 0..999.
        tokens: `[n, 20, 384]` from `TextEncoder`.
        condition: `[n, CONDITION_WIDTH]`: pooled caption, then `ViewCondition.vector`.
        group: 1, or `views`: so many images, one after another, are views of one object and see each other.
        returns v `[n, 3, 64, 64]`.

    Args:
        config: as `UNET_CONFIG`, with or without "views"; None: that.

    Attributes:
        views: images that it was trained to read as a group; beside them it reads single ones.

    Raises:
        ValueError: a setting that no prior has; in `forward`, a group that it was not trained for, or a part of one.
    """

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.config = {"views": 1, **(UNET_CONFIG if config is None else config)}
        for key, value in UNET_CONFIG.items():
            # A file's lists are the tuples of the code.
            if key not in _FREE and json.dumps(self.config.get(key)) != json.dumps(value):
                raise ValueError(f"{key}: got {self.config.get(key)}, want {value}")
        if unknown := self.config.keys() - UNET_CONFIG.keys() - {"views"}:
            raise ValueError(f"unknown settings: {sorted(unknown)}")
        self.views = self.config["views"]
        if type(self.views) is not int or not 1 <= self.views <= MAX_VIEWS:
            raise ValueError(f"views: got {self.views!r}, want a whole number from 1 to {MAX_VIEWS}")
        self.unet = PriorUNet(self.config)

    def forward(self, noisy: Tensor, timestep: Tensor, tokens: Tensor, condition: Tensor, group: int = 1) -> Tensor:
        self.check_group(group, len(noisy))
        packed = nn.functional.pixel_unshuffle(noisy, 2)
        return nn.functional.pixel_shuffle(self.unet(packed, timestep, tokens, condition, group), 2)

    def check_group(self, group: int, images: int) -> None:
        """Raise ValueError unless so many images are groups that it was trained for."""
        if group not in (1, self.views):
            raise ValueError(f"group: got {group}, want " + " or ".join(str(n) for n in sorted({1, self.views})))
        if images % group:
            raise ValueError(f"group: got {group} for {images} images, want a divisor")


def alphas_cumprod() -> Tensor:
    """abar_t of the schedule that the prior was trained with, `[1000]` float32: the cosine, each beta at most 0.999."""

    def level(t: int) -> float:
        return math.cos((t / TRAIN_TIMESTEPS + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - level(t + 1) / level(t), 0.999) for t in range(TRAIN_TIMESTEPS)]
    return (1 - torch.tensor(betas, dtype=torch.float32)).cumprod(0)


def noise_schedule() -> Any:
    """diffusers' sampler for the prior, with the schedule of `alphas_cumprod`."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=True,
        clip_sample_range=1.0,
        timestep_spacing="trailing",
    )


def save_prior(network_state: dict[str, Tensor], config: dict[str, Any], path: Path, card: dict[str, str]) -> None:
    """Write weights (int8 with row scales), architecture and card to one file; see `save_weights`."""
    save_weights(path, network_state, {"config": json.dumps(config), **card})


def load_prior(folder: Path = WEIGHTS) -> PriorNetwork:
    """The trained network from `prior.safetensors.gz`, float32, on the CPU, in evaluation mode, its parameters frozen.

    Raises:
        UserError: the file is damaged, or the network it describes has other parameters.
    """
    return load_network(folder / PRIOR_FILE, PriorNetwork)
