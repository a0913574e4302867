"""Configurations of the large models that people use, to be built with random weights where the real ones are not.

Time and memory do not depend on the weights. Numbers of parameters, in millions, are there to see that a configuration
is the one of the name; `python benchmarks/architectures.py` counts them without allocating any.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dreamfusion_fast.guidance import GuidanceConfig, PromptEmbeddings, PromptSet, ScoreDistillation
from dreamfusion_fast.guidance.pipeline_source import PipelineSource

TOKENS = 77

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


class RandomWeights(PipelineSource):
    """A pipeline with random weights, for `dreamfusion_fast.guidance.diffusers_models`: no files are read.

    Args:
        unet: a name of `UNETS`.
        vae: a name of `VAES`, or None: a model of pixels.
    """

    def __init__(self, unet: str, vae: str | None) -> None:
        self._unet, self._vae = unet, vae
        super().__init__(unet, GuidanceConfig(name="random/weights"))

    def _json(self, relative: str) -> dict[str, Any]:
        sdxl = self._unet == "sdxl"
        texts = {"text_encoder": 768} | ({"text_encoder_2": 1280} if sdxl else {})
        if self._unet == "sd-2.1":
            texts["text_encoder"] = 1024
        parts = {name: ["transformers", "CLIPTextModel"] for name in texts}
        parts |= {name.replace("text_encoder", "tokenizer"): ["transformers", "CLIPTokenizer"] for name in texts}
        if sdxl:
            parts["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        clip = {"model_type": "clip_text_model", "max_position_embeddings": TOKENS, "num_hidden_layers": 12}
        if self._vae is None:
            parts = {"text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5Tokenizer"]}
            texts, clip = {"text_encoder": 4096}, {"model_type": "t5", "d_model": 4096}
        else:
            parts["vae"] = ["diffusers", "AutoencoderKL"]
        kind = "IFPipeline" if self._vae is None else f"StableDiffusion{'XL' if sdxl else ''}Pipeline"
        contents: dict[str, dict[str, Any]] = {
            "model_index.json": {
                "_class_name": kind,
                "unet": ["diffusers", "UNet2DConditionModel"],
                "scheduler": ["diffusers", "DDPMScheduler"],
                **parts,
            },
            "unet/config.json": {"in_channels": 4, **UNETS[self._unet]},
            "vae/config.json": VAES.get(self._vae or "", {}),
            "scheduler/scheduler_config.json": {
                "_class_name": "DDPMScheduler",
                "num_train_timesteps": 1000,
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
            },
        }
        for name, width in texts.items():
            contents[f"{name}/config.json"] = {"hidden_size": width, "projection_dim": width, **clip}
        return contents[relative]

    def _file(self, relative: str) -> Path:
        raise FileNotFoundError(relative)

    def _weight_files(self, component: str) -> None:
        return None

    @property
    def _location(self) -> dict[str, Any]:
        return {}

    def identity(self, components: list[str]) -> str:
        return f"random weights of {self._unet}: {components}"

    def load(self, component: str, dtype: torch.dtype | None = None, **options: Any) -> Any:
        """As the real one, but straight to the GPU if there is one."""
        assert dtype is not None
        name = self._unet if component == "unet" else self._vae
        assert name is not None
        return build(component, name, dtype, "cuda" if torch.cuda.is_available() else "cpu")


class RandomPrompts(ScoreDistillation):
    """Score distillation whose prompts are embedded as random numbers: text encoders are gone before a run begins."""

    def embed(self, prompts: PromptSet | str) -> PromptEmbeddings:
        """Five rows of the model's widths."""
        generator = torch.Generator().manual_seed(0)
        config = UNETS[self.name]
        width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
        tensors = {"hidden": torch.randn(PromptEmbeddings.ROWS, TOKENS, width, generator=generator)}
        if config.get("addition_embed_type") == "text_time":
            tensors["pooled"] = torch.randn(PromptEmbeddings.ROWS, 1280, generator=generator)
        return PromptEmbeddings({name: x.half() for name, x in tensors.items()}).to(self.model.device)


if __name__ == "__main__":
    for unet in UNETS:
        count = sum(parameter.numel() for parameter in build("unet", unet, torch.float16, "meta").parameters())
        print(f"{unet}: {count / 1e6:.0f} M parameters, expected {MILLIONS.get(unet, '?')}")
