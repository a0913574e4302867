"""Low-rank adaptations (LoRA, Hu et al. 2021) from files: checked before a model is loaded, then merged into weights.

A LoRA changes weights W [out, in, ...] of linear layers and convolutions to

    W + scale alpha / rank  up down

with down [rank, in, ...] and up [out, rank], or with a convolution [rank, rank, height, width] between them. Merged, it
costs nothing in a step, and kernels and captured graphs see a model like any other. Names are those of kohya's scripts
("lora_unet_...", by diffusers' blocks or by the original ones), of diffusers in all its versions, and of PEFT.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamfusion_fast.errors import one_line
from dreamfusion_fast.guidance.config import split_file
from dreamfusion_fast.guidance.models.original_layout import plain_text_name
from dreamfusion_fast.guidance.models.pipeline_files import parse_json, read_tensors

# Parts of a pair, and the ends of their names in the several formats.
_ROLES = {
    "down": re.compile(r"(.+?)(?:\.lora_down|\.lora_A(?:\.default)?|[._]lora\.down|\.lora_linear_layer\.down)\.weight"),
    "up": re.compile(r"(.+?)(?:\.lora_up|\.lora_B(?:\.default)?|[._]lora\.up|\.lora_linear_layer\.up)\.weight"),
    "mid": re.compile(r"(.+?)\.lora_mid\.weight"),
    "alpha": re.compile(r"(.+?)(?:_lora)?\.alpha"),
}
_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_w1": "LoHa",
    "lokr_w": "LoKr",
    "oft_": "OFT",
    "lora_B.bias": "LoRA with biases",
    "lora_B.default.bias": "LoRA with biases",
}
_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
_KOHYA = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
# How diffusers once called the projections of a text encoder.
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_MOST_TENSORS = 50_000
_NAMED = 3


@dataclass(frozen=True)
class Pair:
    """The names of tensors that change one weight, and the factor of their product."""

    down: str
    up: str
    mid: str | None
    factor: float


@dataclass(frozen=True)
class Lora:
    """One file, checked against a pipeline.

    Attributes:
        path: of the file.
        digest: sha256 of its contents.
        scale: that was asked for; the factors of the pairs hold it.
        pairs: by component and name of the weight.
    """

    path: Path
    digest: str
    scale: float
    pairs: Mapping[str, Mapping[str, Pair]]

    def merge(self, component: str, model: torch.nn.Module) -> None:
        """Change the weights of a component, on whatever device and in whatever type they are.

        Sums are taken in float32 at least and rounded once.

        Raises:
            ValueError: the file is no longer the one that was checked; a weight leaves the range of its type.
        """
        pairs = self.pairs.get(component)
        if not pairs:
            return
        tensors, _, digest = read_tensors(self.path)
        if digest != self.digest:
            raise ValueError(f"{self.path} has changed since it was checked")
        weights = dict(model.named_parameters())
        with torch.no_grad():
            for name, pair in pairs.items():
                weight = weights[name]
                wide = torch.promote_types(weight.dtype, torch.float32)
                down, up = (tensors[part].to(weight.device, wide) for part in (pair.down, pair.up))
                middle = None if pair.mid is None else tensors[pair.mid].to(weight.device, wide)
                change = product(down, up, middle).reshape(weight.shape)
                merged = (weight.to(wide) + pair.factor * change).to(weight.dtype)
                if not bool(merged.isfinite().all()):
                    raise ValueError(f"{self.path} brings {component}'s {name} out of the range of {weight.dtype}")
                weight.copy_(merged)


def product(down: Tensor, up: Tensor, middle: Tensor | None = None) -> Tensor:
    """The change of a weight, ``[out, in, ...]``, without its factor, from ``[rank, in, ...]`` and ``[out, rank]``."""
    up = up.flatten(1)
    if middle is None:
        return (up @ down.flatten(1)).reshape(len(up), *down.shape[1:])
    return torch.einsum("or,rshw,si->oihw", up, middle, down.flatten(1))


def open_lora(text: str, shapes: Mapping[str, Mapping[str, Sequence[int]]], aliases: Mapping[str, str]) -> Lora:
    """Read and check a LoRA.

    Args:
        text: path of a safetensors file, and its scale if it is not 1: "file.safetensors:0.8".
        shapes: of the weights of the pipeline's components, by component and name.
        aliases: names of the U-Net's weights, without ".weight", in the original layout, to diffusers' names.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no LoRA for this pipeline.
    """
    name, scale_text = split_file(text)
    scale = 1.0 if scale_text is None else float(scale_text)
    path = Path(name)
    tensors, metadata, digest = read_tensors(path)
    if len(tensors) > _MOST_TENSORS:
        raise ValueError(f"it holds {len(tensors)} tensors, want at most {_MOST_TENSORS}")
    for key, value in tensors.items():
        for part, kind in _OTHER_KINDS.items():
            if part in key:
                raise ValueError(f"it is a {kind} ({one_line(key, 150)}), which is not served: want a plain LoRA")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{one_line(key, 150)} holds NaN or infinity")
    places = _Places(shapes, aliases)
    settings = _Settings(metadata)
    modules: dict[str, dict[str, str]] = {}
    strange: list[str] = []
    for key in tensors:
        for role, pattern in _ROLES.items():
            if match := pattern.fullmatch(key):
                modules.setdefault(match[1], {})[role] = key
                break
        else:
            strange.append(key)
    if strange or not modules:
        held = f"{len(strange)} of its tensors are no part of one: {_some(strange)}" if strange else "it is empty"
        raise ValueError(f"it is no LoRA, {held}")
    pairs: dict[str, dict[str, Pair]] = {}
    unmatched: list[str] = []
    for module, roles in modules.items():
        found = places.find(module)
        if found is None:
            unmatched.append(module)
            continue
        component, weight = found
        if not {"down", "up"} <= roles.keys():
            raise ValueError(f"{one_line(module, 120)} lacks {' and '.join(sorted({'down', 'up'} - roles.keys()))}")
        if weight in pairs.setdefault(component, {}):
            raise ValueError(f"{component}'s {weight} is changed twice, by {one_line(module, 120)} as well")
        pairs[component][weight] = _pair(module, roles, tensors, shapes[component][weight], component, scale, settings)
    if unmatched:
        raise ValueError(
            f"{len(unmatched)} of the {len(modules)} layers that it changes are not in this pipeline: "
            f"{_some(unmatched)}; it was made for another model"
        )
    return Lora(path, digest, scale, pairs)


def _pair(
    module: str,
    roles: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    shape: Sequence[int],
    component: str,
    scale: float,
    settings: _Settings,
) -> Pair:
    """Raises ValueError where shapes do not fit the weight's."""
    down, up = tensors[roles["down"]], tensors[roles["up"]]
    mid = tensors[roles["mid"]] if "mid" in roles else None
    rank = down.shape[0] if down.ndim else 0
    wanted = [rank, shape[1], *(() if mid is not None else shape[2:])]
    fits = rank > 0 and _plain(down.shape) == _plain(wanted) and _plain(up.shape) == _plain([shape[0], rank])
    if mid is not None:
        fits = fits and list(mid.shape) == [rank, rank, *shape[2:]] and len(shape) == 4
    if not fits:
        held = " and ".join(str(list(part.shape)) for part in (down, up, *(() if mid is None else (mid,))))
        raise ValueError(
            f"{one_line(module, 120)} is {held}, which do not fit a weight of {list(shape)}: it was made for another "
            "model"
        )
    if "alpha" in roles:
        value = tensors[roles["alpha"]]
        if value.numel() != 1:
            raise ValueError(f"{one_line(roles['alpha'], 120)} is {list(value.shape)}, want one number")
        factor = float(value) / rank
    else:
        factor = settings.factor(component, module, rank)
    return Pair(roles["down"], roles["up"], roles.get("mid"), scale * factor)


class _Places:
    """Weights of the pipeline by what files call their layers."""

    def __init__(self, shapes: Mapping[str, Mapping[str, Sequence[int]]], aliases: Mapping[str, str]):
        self._dotted: dict[str, dict[str, str]] = {}
        self._flat: dict[str, dict[str, str]] = {}
        for component, weights in shapes.items():
            layers = {name.removesuffix(".weight"): name for name in weights if len(weights[name]) in (2, 4)}
            if component.startswith("text_encoder"):
                layers = {plain_text_name(layer): name for layer, name in layers.items()}
            elif component == "unet":
                layers |= {alias: layers[layer] for alias, layer in aliases.items() if layer in layers}
            self._dotted[component] = layers
            self._flat[component] = {layer.replace(".", "_"): name for layer, name in layers.items()}

    def find(self, module: str) -> tuple[str, str] | None:
        """Component and weight of a layer, None: there is no such."""
        for prefix, component in _KOHYA.items():
            if module.startswith(prefix):
                layer = module.removeprefix(prefix)
                if component != "unet":
                    layer = layer.removeprefix("text_model_")
                name = self._flat.get(component, {}).get(layer)
                return None if name is None else (component, name)
        module = module.removeprefix("base_model.model.")
        component, _, layer = module.partition(".")
        if component not in _COMPONENTS:  # files for a U-Net alone, as diffusers and PEFT write them
            component, layer = "unet" if "unet" in self._dotted else "transformer", module
        layer = layer.replace(".processor.", ".")
        if component.startswith("text_encoder"):
            layer = plain_text_name(layer)
            before, _, last = layer.rpartition(".")
            layer = f"{before}.{_OLD_TEXT.get(last, last)}"
        layers = self._dotted.get(component, {})
        name = layers.get(layer) or layers.get(f"{layer}.0" if layer.endswith(".to_out") else layer)
        return None if name is None else (component, name)


class _Settings:
    """What diffusers writes about a LoRA into the file's metadata: PEFT's alpha and the like, by component."""

    def __init__(self, metadata: Mapping[str, str]):
        text = metadata.get("lora_adapter_metadata")
        self._fields: dict[str, Any] = {} if text is None else parse_json(text.encode())

    def factor(self, component: str, module: str, rank: int) -> float:
        """alpha / rank of a layer without an alpha of its own; as in diffusers, 1 where nothing is said."""
        if module.startswith("base_model.model.") and not self._fields:
            raise ValueError(
                "it is in PEFT's own format, which keeps alpha in another file: want one that diffusers saved"
            )

        def field(name: str, default: Any) -> Any:
            return self._fields.get(f"{component}.{name}", default)

        if field("use_dora", False):
            raise ValueError("it is a DoRA, which is not served: want a plain LoRA")
        alpha = field("lora_alpha", rank)
        pattern = field("alpha_pattern", {})
        for layer, value in pattern.items() if isinstance(pattern, dict) else ():
            if re.fullmatch(r"[\w.]+", layer) is None:
                raise ValueError(f"its alpha_pattern holds {one_line(layer, 80)!r}, want names of layers")
            if module == layer or module.endswith(f".{layer}"):
                alpha = value
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ValueError(f"the alpha of {one_line(module, 80)} is {one_line(repr(alpha), 40)}, want a number")
        return alpha / (math.sqrt(rank) if field("use_rslora", False) else rank)


def _plain(shape: Sequence[int]) -> list[int]:
    """A shape without ones at its end: a convolution of 1 x 1 is a linear layer."""
    shape = list(shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape.pop()
    return shape


def _some(names: Sequence[str]) -> str:
    return ", ".join(one_line(name, 100) for name in names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
