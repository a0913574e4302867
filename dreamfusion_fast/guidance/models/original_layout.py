"""Names of weights in the original layout of Stable Diffusion and SDXL, which checkpoints and LoRAs of the sites have.

The layout is that of the projects that published the models (latent-diffusion, generative-models, OpenCLIP). All blocks
of a U-Net are numbered through there; diffusers numbers them by level. Names are paths of modules or of weights, as in
a state dict.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet_names(names: Iterable[str], layers: int) -> dict[str, str]:
    """The original name of each part of diffusers' `UNet2DConditionModel`, those that have none left out.

    Args:
        names: diffusers' names, all of one U-Net.
        layers: residual blocks per level on the way down.
    """
    names = list(names)
    attending = {match[1] for name in names if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
    found = {name: _unet_name(name, layers, attending) for name in names}
    return {name: original for name, original in found.items() if original is not None}


def _unet_name(name: str, layers: int, attending: set[str]) -> str | None:
    if (renamed := _renamed(name, _UNET)) is not None:
        return renamed
    match = re.match(r"(down|mid|up)_block(?:s\.(\d+))?\.(\w+)\.(\d+)\.(.+)", name)
    if match is None:
        return None
    way, level, kind, index, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "resnets":
        rest = _renamed(rest, _UNET_RESNET) or rest
    if way == "mid":
        return f"middle_block.{2 * index if kind == 'resnets' else 2 * index + 1}.{rest}"
    first = level * (layers + 1)
    if kind in ("resnets", "attentions"):
        place = f"input_blocks.{1 + first + index}" if way == "down" else f"output_blocks.{first + index}"
        return f"{place}.{0 if kind == 'resnets' else 1}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.{rest.replace('conv', 'op', 1)}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{2 if match[2] in attending else 1}.{rest}"
    return None


def vae_name(name: str, levels: int) -> str:
    """The original name of a part of diffusers' `AutoencoderKL` with that many levels."""
    match = re.match(r"(encoder|decoder)\.(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)", name)
    if match is None:
        return name.replace("conv_norm_out", "norm_out")
    half, way, level, kind, index, rest = match.groups()
    if way is None:
        if kind == "attentions":
            return f"{half}.mid.attn_{int(index) + 1}.{_renamed(rest, _VAE_ATTENTION) or rest}"
        return f"{half}.mid.block_{int(index) + 1}.{rest}"
    place = f"{half}.{way}.{int(level) if way == 'down' else levels - 1 - int(level)}"
    if kind == "resnets":
        return f"{place}.block.{index}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
    return f"{place}.{'downsample' if way == 'down' else 'upsample'}.{rest}"


def open_clip_name(name: str) -> tuple[str, int | None]:
    """The name of a weight of transformers' CLIP text model in OpenCLIP, and which third of that weight it is.

    OpenCLIP keeps the projections to queries, keys and values in one; None: the whole. Its `text_projection` is
    transposed.
    """
    name = plain_text_name(name)
    if (renamed := _renamed(name, _OPEN_CLIP)) is not None:
        return renamed, None
    match = re.match(r"encoder\.layers\.(\d+)\.(.+)", name)
    if match is None:
        return name, None
    block, rest = f"transformer.resblocks.{match[1]}", match[2]
    if part := re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", rest):
        return f"{block}.attn.in_proj_{part[2]}", "qkv".index(part[1])
    return f"{block}.{_renamed(rest, _OPEN_CLIP_LAYER) or rest}", None


def plain_text_name(name: str) -> str:
    """A name in a CLIP text model without the prefix that transformers had up to version 4, and checkpoints have."""
    return name.removeprefix("text_model.")


def _renamed(name: str, names: dict[str, str]) -> str | None:
    """A name whose first parts are in `names`, with those replaced; None: there are none such."""
    for old, new in names.items():
        if name == old or name.startswith(f"{old}."):
            return new + name[len(old) :]
    return None
