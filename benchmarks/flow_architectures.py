"""Configurations of published flow-matching models, to be run with random weights where the real ones are not.

Their weights are views of one block of random numbers for each number of inputs, so that 12 billion of them take no
memory before they are copied to a GPU. `python benchmarks/flow_architectures.py` counts parameters without any.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from architectures import _CLIP_L, _T5_XXL, TEXT_ENCODERS, VAES, random_tokens
from torch import nn

from dreamfusion_fast.guidance import GuidanceConfig, PromptEmbeddings, PromptSet, ScoreDistillation
from dreamfusion_fast.guidance.models.pipeline_classes import component_class
from dreamfusion_fast.guidance.models.pipeline_source import PipelineSource

_SD3: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
_FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "sd-3": _SD3,
    "sd-3.5-medium": _SD3
    | {"dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm", "pos_embed_max_size": 384},
    "sd-3.5-large": _SD3
    | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"},
    "flux-dev": _FLUX,
    "flux-schnell": _FLUX | {"guidance_embeds": False},
    # Not published: to try the benchmark without a GPU.
    "tiny-sd": _SD3 | {"sample_size": 16, "num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128},
    "tiny-flux": _FLUX
    | {"sample_size": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    | {"axes_dims_rope": (4, 6, 6)},
}
# Numbers in the published files, which hold Stable Diffusion 3's table of positions, too.
MILLIONS = {"sd-3": 2085, "sd-3.5-medium": 2470, "sd-3.5-large": 8146, "flux-dev": 11901, "flux-schnell": 11891}

_VAE = VAES["sd"] | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 1024}


def _is_flux(name: str) -> bool:
    return "flux" in name


def _parts(name: str) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Component -> library, class and configuration."""
    clips = [_CLIP_L, TEXT_ENCODERS["sdxl"]["text_encoder_2"]]
    if _is_flux(name):
        vae = _VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159}
        texts = {"": ("CLIPTextModel", clips[0]), "_2": ("T5EncoderModel", _T5_XXL)}
    else:
        vae = _VAE | {"scaling_factor": 1.5305, "shift_factor": 0.0609}
        texts = {suffix: ("CLIPTextModelWithProjection", clip) for suffix, clip in zip(("", "_2"), clips, strict=True)}
        texts["_3"] = ("T5EncoderModel", _T5_XXL)
    transformer = "FluxTransformer2DModel" if _is_flux(name) else "SD3Transformer2DModel"
    return {
        "transformer": ("diffusers", transformer, TRANSFORMERS[name]),
        "vae": ("diffusers", "AutoencoderKL", vae),
        **{f"text_encoder{suffix}": ("transformers", *text) for suffix, text in texts.items()},
        **{f"tokenizer{suffix}": ("transformers", "PreTrainedTokenizerFast", {}) for suffix in texts},
    }


def _scheduler(name: str) -> dict[str, Any]:
    dynamic = name in ("flux-dev", "tiny-flux")
    shift = 1.0 if name == "flux-schnell" else 3.0
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": shift,
        "use_dynamic_shifting": dynamic,
    }


def fill(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model of the meta device weights in main memory, which are views of a few blocks of random numbers."""
    generator = torch.Generator().manual_seed(0)
    largest: dict[int, int] = {}
    for parameter in model.parameters():
        if parameter.dim() > 1:
            fan_in = parameter[0].numel()
            largest[fan_in] = max(largest.get(fan_in, 0), parameter.numel())
    numbers = torch.empty(max(largest.values())).uniform_(-1, 1, generator=generator)
    blocks = {fan_in: (numbers[:size] * fan_in**-0.5).to(dtype) for fan_in, size in largest.items()}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() > 1:
                values = blocks[parameter[0].numel()][: parameter.numel()].view(parameter.shape)
            else:  # scales of norms, and biases
                values = torch.full(parameter.shape, float(name == "weight"), dtype=dtype)
            setattr(module, name, nn.Parameter(values, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):  # positions of Stable Diffusion 3
            module.register_buffer(name, torch.zeros(buffer.shape, dtype=dtype))


class RandomFlow(PipelineSource):
    """A flow-matching pipeline with random weights, for `guidance.models.flow_pipelines`: no files are read.

    Args:
        name: of `TRANSFORMERS`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        super().__init__(name, GuidanceConfig(name="random/weights"))

    def _json(self, relative: str) -> dict[str, Any]:
        parts = _parts(self._name)
        index: dict[str, Any] = {name: list(part[:2]) for name, part in parts.items()}
        index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
        index["_class_name"] = "FluxPipeline" if _is_flux(self._name) else "StableDiffusion3Pipeline"
        contents = {"model_index.json": index, "scheduler/scheduler_config.json": _scheduler(self._name)}
        return (contents | {f"{name}/config.json": part[2] for name, part in parts.items()})[relative]

    def _file(self, relative: str) -> Path:
        raise FileNotFoundError(relative)

    def _files_in(self, component: str) -> None:
        return None

    def _identity(self, components: list[str]) -> str:
        return f"random weights of {self._name}: {components}"

    def load(self, component: str, dtype: torch.dtype | None = None, **options: Any) -> Any:
        """As the real one: to main memory. Text encoders are not loaded here."""
        if dtype is None:
            return random_tokens
        library, class_name, config = _parts(self._name)[component]
        model_class = component_class(component, library, class_name)
        known = {key: value for key, value in config.items() if key != "sample_size" or not _is_flux(self._name)}
        with torch.device("meta"):
            model = model_class(**(known if component == "transformer" else config))
        fill(model, dtype)
        return model.eval().requires_grad_(False)


class RandomFlowPrompts(ScoreDistillation):
    """Score distillation whose prompts are embedded as random numbers: text encoders are gone before a run begins."""

    def embed(self, prompts: PromptSet | str) -> PromptEmbeddings:
        """Five rows of the model's widths."""
        model: Any = self.model
        generator = torch.Generator().manual_seed(0)
        (_, hidden), (pooled,) = (model.text_shapes()[name] for name in ("hidden", "pooled"))
        shapes = {"hidden": (model._text_tokens, hidden), "pooled": (pooled,)}
        tensors = {
            name: torch.randn(PromptEmbeddings.ROWS, *shape, generator=generator).to(model.dtype)
            for name, shape in shapes.items()
        }
        return PromptEmbeddings(tensors).to(model.device)


if __name__ == "__main__":
    for architecture in TRANSFORMERS:
        network = RandomFlow(architecture).skeleton("transformer")
        count = sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))
        print(f"{architecture}: {count / 1e6:.0f} M numbers, expected {MILLIONS.get(architecture, '?')}")
