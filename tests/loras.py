"""LoRA files for the tiny pipelines, in the formats that people bring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dreamfusion_fast.guidance.models.original_layout import plain_text_name, unet_names

# Layers of the tiny pipelines: attention, a 1 x 1 and a 3 x 3 convolution, and what lies outside the blocks.
UNET_LAYERS = [
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "up_blocks.0.attentions.1.proj_in",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.downsamplers.0.conv",
    "mid_block.resnets.1.time_emb_proj",
    "conv_in",
]
TEXT_LAYERS = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.self_attn.out_proj", "encoder.layers.0.mlp.fc1"]
RANK = 3


def pairs(
    model: torch.nn.Module, layers: list[str], seed: int = 0, rank: int = RANK
) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> down and up."""
    generator = torch.Generator().manual_seed(seed)
    weights = {plain_text_name(name): value for name, value in model.named_parameters()}
    made = {}
    for layer in layers:
        shape = weights[f"{layer}.weight"].shape
        down = torch.randn(rank, *shape[1:], generator=generator) * 0.3
        made[layer] = (down, torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator) * 0.3)
    return made


def kohya(
    path: Path,
    parts: dict[str, dict[str, tuple[Tensor, Tensor]]],
    alpha: float | None = 1.5,
    original: dict[str, str] | None = None,
) -> Path:
    """As kohya's scripts write it; `parts` by prefix, `original`: names of the U-Net's layers."""
    tensors: dict[str, Tensor] = {}
    for prefix, layers in parts.items():
        for layer, (down, up) in layers.items():
            name = (original or {}).get(layer, layer) if prefix == "lora_unet" else f"text_model.{layer}"
            name = f"{prefix}_{name.replace('.', '_')}"
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            if alpha is not None:
                tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


def diffusers(
    path: Path, parts: dict[str, dict[str, tuple[Tensor, Tensor]]], metadata: dict[str, str] | None = None
) -> Path:
    """As diffusers writes it now; `parts` by component."""
    tensors: dict[str, Tensor] = {}
    for component, layers in parts.items():
        for layer, (down, up) in layers.items():
            name = f"{component}.{'text_model.' if component.startswith('text') else ''}{layer}"
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(tensors, path, metadata=metadata)
    return path


def old_diffusers(path: Path, layers: dict[str, tuple[Tensor, Tensor]], prefix: str = "unet.") -> Path:
    """As diffusers wrote attention processors of a U-Net before PEFT."""
    tensors: dict[str, Tensor] = {}
    for layer, (down, up) in layers.items():
        before, _, last = layer.removesuffix(".0").rpartition(".")
        name = f"{prefix}{before}.processor.{last}_lora"
        tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    save_file(tensors, path)
    return path


def original_names(unet: Any) -> dict[str, str]:
    """diffusers' names of layers to the original ones."""
    names = [name.removesuffix(".weight") for name, _ in unet.named_parameters() if name.endswith(".weight")]
    return unet_names(names, unet.config.layers_per_block)
