"""Configurations of the large models that people use, to be built with random weights where the real ones are not.

Time and memory do not depend on the weights. Numbers of parameters, in millions, are there to see that a configuration
is the one of the name; `python benchmarks/architectures.py` counts them without allocating any.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dreamfusion_fast.guidance import GuidanceConfig, PromptEmbeddings, PromptSet, ScoreDistillation
from dreamfusion_fast.guidance.models.pipeline_source import PipelineSource

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

_CLIP: dict[str, Any] = {"model_type": "clip_text_model", "max_position_embeddings": TOKENS, "vocab_size": 49408}
_CLIP_L = _CLIP | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_T5_XXL: dict[str, Any] = {
    "model_type": "t5",
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
    "tie_word_embeddings": False,
}
# Component -> configuration; IF's are all T5-XXL.
TEXT_ENCODERS: dict[str, dict[str, dict[str, Any]]] = {
    "sd-1.5": {"text_encoder": _CLIP_L},
    "sd-2.1": {
        "text_encoder": _CLIP
        | {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "projection_dim": 512,
            "hidden_act": "gelu",
        }
    },
    "sdxl": {
        "text_encoder": _CLIP_L,
        "text_encoder_2": _CLIP
        | {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "projection_dim": 1280,
            "hidden_act": "gelu",
        },
    },
    **{name: {"text_encoder": _T5_XXL} for name in UNETS if name.startswith("if")},
}

MILLIONS = {"sd-1.5": 860, "sd-2.1": 866, "sdxl": 2567, "if-i-xl": 4300}
TEXT_MILLIONS = {"sd-1.5": 123, "sd-2.1": 340, "sdxl": 123 + 695, "if-i-xl": 4762}


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


def build_in_main_memory(kind: str, name: str, dtype: torch.dtype) -> Any:
    """The same in main memory, quickly: one block of numbers over and over, scaled as the layers' own would be."""
    model = build(kind, name, dtype, "meta").to_empty(device="cpu")
    numbers = 2 * torch.rand(1 << 22, generator=torch.Generator().manual_seed(0)) - 1
    blocks: dict[int, torch.Tensor] = {}  # by fan-in
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() < 2:  # scales of norms, and biases
            parameter.data.fill_(float("norm" in parameter_name and parameter_name.endswith("weight")))
            continue
        fan_in = parameter[0].numel()
        if fan_in not in blocks:
            blocks[fan_in] = (numbers * fan_in**-0.5).to(dtype)
        _fill(parameter, blocks[fan_in])
    return model


def _fill(parameter: torch.Tensor, block: torch.Tensor) -> None:
    """Write a block over and over."""
    flat = parameter.data.view(-1)
    for start in range(0, flat.numel(), block.numel()):
        part = flat[start : start + block.numel()]
        part.copy_(block[: part.numel()])


def build_text_encoder(class_name: str, config: dict[str, Any], dtype: torch.dtype) -> Any:
    """A frozen text encoder in main memory, with normally distributed weights of deviation 0.02."""
    import transformers

    model_class = getattr(transformers, class_name)
    with torch.device("meta"):
        model = model_class(model_class.config_class.from_dict(config))
    # Positions and the like are buffers that the constructor computes: those of a model small enough to be made.
    small = {"num_hidden_layers": 1, "num_layers": 1, "intermediate_size": 64, "d_ff": 64, "vocab_size": 64}
    buffers = dict(model_class(model_class.config_class.from_dict(config | small)).named_buffers())
    model = model.to(dtype).to_empty(device="cpu")
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    # One block of numbers over and over: time and memory are the same, and 5 billion draws would take a minute.
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    for parameter in model.parameters():
        _fill(parameter, block)
    return model.eval().requires_grad_(False)


class RandomWeights(PipelineSource):
    """A pipeline with random weights, for `dreamfusion_fast.guidance.models.pipelines`: no files are read.

    Args:
        unet: a name of `UNETS`.
        vae: a name of `VAES`, or None: a model of pixels.
    """

    def __init__(self, unet: str, vae: str | None) -> None:
        self._unet, self._vae = unet, vae
        super().__init__(unet, GuidanceConfig(name="random/weights"))

    def _json(self, relative: str) -> dict[str, Any]:
        sdxl = self._unet == "sdxl"
        texts = TEXT_ENCODERS[self._unet]
        t5, kind = self._vae is None, f"StableDiffusion{'XL' if sdxl else ''}Pipeline"
        parts = {name: ["transformers", "T5EncoderModel" if t5 else "CLIPTextModel"] for name in texts}
        parts |= {
            name.replace("text_encoder", "tokenizer"): ["transformers", "PreTrainedTokenizerFast"] for name in texts
        }
        if sdxl:
            parts["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        if not t5:
            parts["vae"] = ["diffusers", "AutoencoderKL"]
        contents: dict[str, dict[str, Any]] = {
            "model_index.json": {
                "_class_name": "IFPipeline" if t5 else kind,
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
        contents |= {f"{name}/config.json": config for name, config in texts.items()}
        return contents[relative]

    def _file(self, relative: str) -> Path:
        raise FileNotFoundError(relative)

    def _files_in(self, component: str) -> None:
        return None

    def _identity(self, components: list[str]) -> str:
        return f"random weights of {self._unet}: {components}"

    def load(self, component: str, dtype: torch.dtype | None = None, **options: Any) -> Any:
        """As the real one: to main memory."""
        if dtype is None:
            return random_tokens
        if component.startswith("text_encoder"):
            _, class_name = self.index[component]
            return build_text_encoder(class_name, TEXT_ENCODERS[self._unet][component], dtype)
        name = self._unet if component == "unet" else self._vae
        assert name is not None
        return build_in_main_memory(component, name, dtype)


def random_tokens(texts: str | list[str], max_length: int, **options: Any) -> Any:
    """Stands in for a tokenizer: `max_length` tokens per text of a list, all of them attended to; of one text, a token
    per word and two around them."""
    from transformers import BatchEncoding

    if isinstance(texts, str):
        return BatchEncoding({"input_ids": [1] * min(len(texts.split()) + 2, max_length)})
    ids = torch.randint(1, 30000, (len(texts), max_length), generator=torch.Generator().manual_seed(len(texts[0])))
    return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


random_tokens.model_max_length = TOKENS  # type: ignore[attr-defined]


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
        texts = RandomWeights(unet, None if unet.startswith("if") else "sdxl" if unet == "sdxl" else "sd")
        words = sum(texts.parameters(name) for name in TEXT_ENCODERS[unet])
        print(f"{unet}: {count / 1e6:.0f} M parameters, expected {MILLIONS.get(unet, '?')}; ", end="")
        print(f"text {words / 1e6:.0f} M, expected {TEXT_MILLIONS.get(unet, '?')}")
