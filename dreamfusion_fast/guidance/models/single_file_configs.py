"""What Stable Diffusion 1.x, 2.x and SDXL are made of, which a checkpoint in a single file does not say.

The numbers are those of the models' published configurations.
"""

from __future__ import annotations

from typing import Any

_SD_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
_SD2_UNET = _SD_UNET | {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
_SDXL_UNET: dict[str, Any] = _SD_UNET | {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
_CLIP: dict[str, Any] = {
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
}
_CLIP_L = _CLIP | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
_OPEN_CLIP_H = _CLIP | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,  # of 24: Stable Diffusion 2 reads the last but one
    "num_attention_heads": 16,
    "projection_dim": 512,
    "hidden_act": "gelu",
}
_OPEN_CLIP_BIG_G = _CLIP | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}
_TOKENIZER: dict[str, Any] = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": 77,
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
# OpenCLIP pads with the token of number 0.
_OPEN_CLIP_TOKENIZER = _TOKENIZER | {"pad_token": "!"}
_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _stable_diffusion(
    unet: dict[str, Any], text: dict[str, Any], tokenizer: dict[str, Any], prediction_type: str = "epsilon"
) -> dict[str, dict[str, Any]]:
    return {
        "model_index.json": _INDEX,
        "unet/config.json": unet,
        "vae/config.json": _VAE,
        "text_encoder/config.json": text,
        "tokenizer/tokenizer_config.json": tokenizer,
        "scheduler/scheduler_config.json": _SCHEDULER | {"prediction_type": prediction_type},
    }


CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "stable-diffusion-1.5": _stable_diffusion(
        _SD_UNET | {"cross_attention_dim": 768, "attention_head_dim": 8}, _CLIP_L, _TOKENIZER
    ),
    "stable-diffusion": _stable_diffusion(_SD2_UNET, _OPEN_CLIP_H, _OPEN_CLIP_TOKENIZER),
    "stable-diffusion-2.1": _stable_diffusion(
        _SD2_UNET | {"sample_size": 96}, _OPEN_CLIP_H, _OPEN_CLIP_TOKENIZER, "v_prediction"
    ),
    "sdxl": _stable_diffusion(_SDXL_UNET, _CLIP_L, _TOKENIZER)
    | {
        "model_index.json": _INDEX
        | {
            "_class_name": "StableDiffusionXLPipeline",
            "force_zeros_for_empty_prompt": True,
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        },
        "vae/config.json": _VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        "text_encoder_2/config.json": _OPEN_CLIP_BIG_G,
        "tokenizer_2/tokenizer_config.json": _OPEN_CLIP_TOKENIZER,
    },
}
"""Contents of a pipeline's JSON files, by short name of the model and place."""
