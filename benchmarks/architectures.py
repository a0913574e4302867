"""Configurations of the large models that people use, to be built with random weights where the real ones are not.

Time and memory do not depend on the weights. Numbers of parameters, in millions, are there to see that a configuration
is the one of the name; `python benchmarks/architectures.py` counts them without allocating any.
"""

from __future__ import annotations

from typing import Any

import torch

_SD: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
_IF: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 6,
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 64,
    "attention_head_dim": 64,
    "cross_attention_norm": "group_norm",
    "down_block_types": ("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 3,
    "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "encoder_hid_dim": 4096,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "layers_per_block": 3,
    "resnet_skip_time_act": True,
    "resnet_time_scale_shift": "scale_shift",
    "upcast_attention": False,
}

UNETS: dict[str, dict[str, Any]] = {
    "sd-1.5": _SD | {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd-2.1": _SD | {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "if-i-m": _IF | {"block_out_channels": (192, 384, 576, 768), "cross_attention_dim": 768},
    "if-i-l": _IF | {"block_out_channels": (320, 640, 960, 1280), "cross_attention_dim": 1280},
    "if-i-xl": _IF | {"block_out_channels": (704, 1408, 2112, 2816), "cross_attention_dim": 2816},
}

VAES: dict[str, dict[str, Any]] = {
    "sd": {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 512,
        "scaling_factor": 0.18215,
    }
}
VAES["sdxl"] = VAES["sd"] | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}

MILLIONS = {"sd-1.5": 860, "sd-2.1": 866, "sdxl": 2567, "if-i-xl": 4300}


def build(kind: str, name: str, dtype: torch.dtype, device: torch.device | str) -> Any:
    """A frozen model in evaluation mode: `kind` "unet" or "vae"."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: Any = UNet2DConditionModel(**UNETS[name]) if kind == "unet" else AutoencoderKL(**VAES[name])
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


if __name__ == "__main__":
    for unet in UNETS:
        count = sum(parameter.numel() for parameter in build("unet", unet, torch.float16, "meta").parameters())
        print(f"{unet}: {count / 1e6:.0f} M parameters, expected {MILLIONS.get(unet, '?')}")
