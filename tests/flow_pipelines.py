"""Tiny random pipelines of flow-matching models in diffusers' format, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pipelines import clip, clip_tokenizer, t5_tokenizer, vae, write

T5_WIDTH = 24
CHANNELS = 16


def _t5(folder: Path, suffix: str) -> None:
    from transformers import T5Config, T5EncoderModel

    vocabulary = t5_tokenizer(folder / f"tokenizer{suffix}")
    shape = {"d_model": T5_WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    T5EncoderModel(T5Config(vocab_size=vocabulary, **shape)).save_pretrained(folder / f"text_encoder{suffix}")


def _projected_clip(folder: Path, suffix: str, width: int, pooled: int, **options: Any) -> None:
    from transformers import CLIPTextModelWithProjection

    vocabulary = clip_tokenizer(folder / f"tokenizer{suffix}")
    config = clip(vocabulary, width, projection_dim=pooled, **options)
    CLIPTextModelWithProjection(config).save_pretrained(folder / f"text_encoder{suffix}")


def _heed_text(transformer: Any) -> Any:
    """Untrained, text hardly moves the output; ten times as much is what the tests want to see."""
    with torch.no_grad():
        transformer.context_embedder.weight.mul_(10)
        transformer.time_text_embed.text_embedder.linear_1.weight.mul_(10)
    return transformer


def _index(folder: Path, kind: str, parts: dict[str, list[Any]]) -> None:
    latents = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "vae": ["diffusers", "AutoencoderKL"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    write(folder / "model_index.json", {"_class_name": kind, **latents, **parts})


def _scheduler(folder: Path, **options: Any) -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 100, **options}
    write(folder / "scheduler" / "scheduler_config.json", config)


def make_sd3(folder: Path, with_t5: bool = True) -> Path:
    """A pipeline of Stable Diffusion 3's layout: images 16 x 16, latents 16 x 8 x 8, 100 timesteps shifted by 3."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(4)
    _projected_clip(folder, "", 10, 8)
    _projected_clip(folder, "_2", 6, 12, hidden_act="gelu")
    if with_t5:
        _t5(folder, "_3")
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=8 + 12,
        pos_embed_max_size=12,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    _heed_text(transformer).save_pretrained(folder / "transformer")
    vae(folder, latent_channels=CHANNELS, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)
    _scheduler(folder, shift=3.0)
    projected, tokenizer = ["transformers", "CLIPTextModelWithProjection"], ["transformers", "CLIPTokenizer"]
    _index(
        folder,
        "StableDiffusion3Pipeline",
        {
            "text_encoder": projected,
            "text_encoder_2": projected,
            "text_encoder_3": ["transformers", "T5EncoderModel"] if with_t5 else [None, None],
            "tokenizer": tokenizer,
            "tokenizer_2": tokenizer,
            "tokenizer_3": ["transformers", "PreTrainedTokenizerFast"] if with_t5 else [None, None],
            "transformer": ["diffusers", "SD3Transformer2DModel"],
        },
    )
    return folder


def make_flux(folder: Path, distilled: bool = True) -> Path:
    """A pipeline of FLUX.1's layout: as above, but for the shift, which depends on the size.

    Args:
        folder: where it goes.
        distilled: whether its transformer reads a guidance scale, as dev's; schnell's does not, and is not shifted.
    """
    from diffusers import FluxTransformer2DModel
    from transformers import CLIPTextModel

    torch.manual_seed(5)
    vocabulary = clip_tokenizer(folder / "tokenizer")
    CLIPTextModel(clip(vocabulary, 10)).save_pretrained(folder / "text_encoder")
    _t5(folder, "_2")
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=10,
        guidance_embeds=distilled,
        axes_dims_rope=(2, 2, 4),
    )
    _heed_text(transformer).save_pretrained(folder / "transformer")
    config = folder / "transformer" / "config.json"
    write(config, {**json.loads(config.read_text()), "sample_size": 8})  # published ones have none, and 128 is meant
    vae(folder, latent_channels=CHANNELS, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)
    if distilled:
        _scheduler(folder, shift=3.0, use_dynamic_shifting=True, base_image_seq_len=8, max_image_seq_len=40)
    else:
        _scheduler(folder, shift=1.0, use_dynamic_shifting=False)
    _index(
        folder,
        "FluxPipeline",
        {
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "PreTrainedTokenizerFast"],
            "transformer": ["diffusers", "FluxTransformer2DModel"],
        },
    )
    return folder


FLOW_MAKERS: dict[str, Callable[[Path], Path]] = {
    "sd3": make_sd3,
    "sd3-without-t5": partial(make_sd3, with_t5=False),
    "flux": make_flux,
    "schnell": partial(make_flux, distilled=False),
}
