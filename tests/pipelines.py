"""Tiny random pipelines in diffusers' format, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = ["a", "teapot", "chair", "red", "front", "side", "back", "overhead", "view", ","]
WIDTH = 16
TOKENS = 12


def _unet(channels: int, out_channels: int, **options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    shape: dict[str, Any] = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": WIDTH,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    unet = UNet2DConditionModel(in_channels=channels, out_channels=out_channels, **{**shape, **options})
    # Untrained, text hardly moves the output; ten times as much is what the tests want to see.
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "attn2" in name:
                parameter.mul_(10)
    return unet


def _scheduler(folder: Path, prediction_type: str, class_name: str = "PNDMScheduler") -> None:
    write(
        folder / "scheduler" / "scheduler_config.json",
        {
            "_class_name": class_name,
            "num_train_timesteps": 100,
            "steps_offset": 1,
            "beta_start": 0.001,
            "beta_end": 0.12,
            "beta_schedule": "scaled_linear",
            "prediction_type": prediction_type,
        },
    )


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def clip_tokenizer(folder: Path, pad_token: str = "<|endoftext|>") -> int:
    """A CLIP tokenizer that knows single characters and the few words of the tests; the size of its vocabulary."""
    characters = sorted(set("".join(WORDS)))
    tokens = [*characters, *(character + "</w>" for character in characters)]
    merges = []
    for word in WORDS:
        left = word[0]
        for index in range(1, len(word)):
            right = word[index] + ("</w>" if index == len(word) - 1 else "")
            merges.append(f"{left} {right}")
            left += right
            tokens.append(left)
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    write(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]), encoding="utf-8")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad_token,
    }
    write(folder / "special_tokens_map.json", special)
    write(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, **special},
    )
    return len(tokens)


def t5_tokenizer(folder: Path) -> int:
    """A tokenizer of the T5 kind (pad 0, end of sequence appended) over whole words; the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "model_max_length": 512,
        },
    )
    return len(vocabulary)


def clip(vocabulary: int, width: int, **options: Any) -> Any:
    """The configuration of a CLIP text encoder."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
        **options,
    )


def vae(folder: Path, **options: Any) -> None:
    from diffusers import AutoencoderKL

    shape: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 16,
        "scaling_factor": 0.7,
    }
    AutoencoderKL(**{**shape, **options}).save_pretrained(folder / "vae")


def make_latent(folder: Path, prediction_type: str = "epsilon", text_width: int = WIDTH) -> Path:
    """A pipeline of Stable Diffusion's layout: images 16 x 16, latents 4 x 8 x 8, 100 timesteps."""
    from transformers import CLIPTextModel

    torch.manual_seed(1)
    vocabulary = clip_tokenizer(folder / "tokenizer")
    CLIPTextModel(clip(vocabulary, text_width)).save_pretrained(folder / "text_encoder")
    _unet(4, 4).save_pretrained(folder / "unet")
    vae(folder)
    _scheduler(folder, prediction_type)
    write(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "PNDMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
    return folder


def make_sdxl(folder: Path, prediction_type: str = "epsilon") -> Path:
    """A pipeline of SDXL's layout: two text encoders of 10 and 6 channels, pooled output of 12, latents 4 x 8 x 8."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(3)
    vocabulary = clip_tokenizer(folder / "tokenizer")
    CLIPTextModel(clip(vocabulary, 10)).save_pretrained(folder / "text_encoder")
    # The second tokenizer of SDXL pads with another token than the first. It parts words: this one, none of a view's.
    vocabulary = clip_tokenizer(folder / "tokenizer_2", pad_token="p")
    second = CLIPTextModelWithProjection(clip(vocabulary, 6, projection_dim=12, hidden_act="gelu"))
    second.save_pretrained(folder / "text_encoder_2")
    numbers = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 12 + 6 * 8}
    unet = _unet(4, 4, addition_embed_type="text_time", **numbers)
    unet.save_pretrained(folder / "unet")
    vae(folder, force_upcast=True)
    _scheduler(folder, prediction_type)
    write(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionXLPipeline",
            "feature_extractor": [None, None],
            "force_zeros_for_empty_prompt": True,
            "image_encoder": [None, None],
            "scheduler": ["diffusers", "PNDMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
    return folder


# As in DeepFloyd IF: text keys beside those of the pixels, and the timestep told of the pooled text.
_IF_BLOCKS: dict[str, Any] = {
    "cross_attention_dim": 32,
    "encoder_hid_dim": 24,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "resnet_time_scale_shift": "scale_shift",
    "cross_attention_norm": "group_norm",
    "act_fn": "gelu",
}


def make_pixel(folder: Path, prediction_type: str = "epsilon") -> Path:
    """A pipeline of DeepFloyd IF's layout: images 8 x 8, a learned variance in three more channels, 100 timesteps."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(2)
    vocabulary = t5_tokenizer(folder / "tokenizer")
    T5EncoderModel(
        T5Config(vocab_size=vocabulary, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ).save_pretrained(folder / "text_encoder")
    _unet(3, 6, **_IF_BLOCKS).save_pretrained(folder / "unet")
    _scheduler(folder, prediction_type, "DDPMScheduler")
    write(
        folder / "model_index.json",
        {
            "_class_name": "IFPipeline",
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDPMScheduler"],
            "text_encoder": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "watermarker": [None, None],
        },
    )
    return folder


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """pipeline("latent", "sdxl" or "pixel", prediction_type) or pipeline(one of `FLOW_MAKERS`) -> folder, made once.

    It is to be read only.
    """
    from flow_pipelines import FLOW_MAKERS  # which takes the parts above

    made: dict[tuple[str, str], Path] = {}

    def get(kind: str, prediction_type: str = "epsilon") -> Path:
        if (kind, prediction_type) not in made:
            folder = tmp_path_factory.mktemp(f"{kind}-{prediction_type}")
            with torch.random.fork_rng():
                if kind in FLOW_MAKERS:
                    made[kind, prediction_type] = FLOW_MAKERS[kind](folder)
                else:
                    make = {"latent": make_latent, "sdxl": make_sdxl, "pixel": make_pixel}[kind]
                    made[kind, prediction_type] = make(folder, prediction_type)
        return made[kind, prediction_type]

    return get


@pytest.fixture
def own_pipeline(pipeline: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """The same, a copy of the test's own to damage."""
    import shutil

    def get(kind: str, prediction_type: str = "epsilon") -> Path:
        return Path(shutil.copytree(pipeline(kind, prediction_type), tmp_path / "pipeline"))

    return get
