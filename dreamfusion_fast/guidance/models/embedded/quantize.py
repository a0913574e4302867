"""Weights as int8 with one float32 scale per output row: rounded to 1/254 of the row's largest, or more coarsely.

Only the file is small: weights are expanded when they are loaded, and all arithmetic stays in the type that the model
runs in. The file is a safetensors file under gzip: int8 weights lie in the shape of a bell around zero, so a tenth of
their bytes can be saved, and more where they are rounded to fewer levels than int8 has.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from dreamfusion_fast.errors import UserError, joined
from dreamfusion_fast.io import safetensors_from_bytes, write_bytes

Network = TypeVar("Network", bound=nn.Module)

SCALE_SUFFIX = ".int8_scale"
_SMALLEST_QUANTIZED = 4096
# Bytes: twenty times the prior's. A thousand times as much fits under gzip.
_LARGEST_CONTENT = 2**29
_LARGEST_HEADER = 2**24


def quantize_state_dict(state: dict[str, Tensor], largest: int = 127) -> dict[str, Tensor]:
    """Quantise every weight of two or more dimensions and at least 4096 elements; the rest stays float32.

    Args:
        state: name -> tensor `[rows, ...]`, any floating dtype.
        largest: what a row's largest becomes, 1 to 127.

    Returns:
        name -> int8 tensor of the same shape, with `name + ".int8_scale"` float32 `[rows]` beside it.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        value = tensor.detach().float().cpu()
        if value.ndim < 2 or value.numel() < _SMALLEST_QUANTIZED:
            out[name] = value.contiguous()
            continue
        scale = value.flatten(1).abs().amax(dim=1).clamp_min(1e-12) / largest
        shape = (-1,) + (1,) * (value.ndim - 1)
        out[name] = torch.round(value / scale.view(shape)).to(torch.int8).contiguous()
        out[name + SCALE_SUFFIX] = scale
    return out


def dequantize_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `quantize_state_dict` up to rounding: float32 tensors under their own names.

    Raises:
        ValueError: an int8 tensor has no scale or one of another shape, a scale is not a positive number, or a scale
            belongs to no int8 tensor.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(SCALE_SUFFIX):
            owner = state.get(name.removesuffix(SCALE_SUFFIX))
            if owner is None or owner.dtype != torch.int8:
                raise ValueError(f"{name} is the scale of no int8 tensor")
            continue
        if tensor.dtype != torch.int8:
            out[name] = tensor.float()
            continue
        scale = state.get(name + SCALE_SUFFIX)
        if scale is None:
            raise ValueError(f"{name} is int8 and its scale {name + SCALE_SUFFIX} is missing")
        if scale.shape != tensor.shape[:1]:
            want = list(tensor.shape[:1])
            raise ValueError(f"{name + SCALE_SUFFIX} must have shape {want}, got {list(scale.shape)}")
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise ValueError(f"{name + SCALE_SUFFIX} must be positive and finite")
        out[name] = tensor.float() * scale.view((-1,) + (1,) * (tensor.ndim - 1))
    return out


def save_weights(
    path: str | os.PathLike[str], state: dict[str, Tensor], metadata: dict[str, str], largest: int = 127
) -> None:
    """Write `quantize_state_dict(state, largest)` and metadata to `path` (`*.safetensors.gz`), whole or not at all.

    The same weights give the same bytes: the gzip header holds neither time nor name.

    Args:
        path: file in a folder that exists.
        state: name -> tensor `[rows, ...]`, any floating dtype.
        metadata: to be kept in the safetensors header.
        largest: as of `quantize_state_dict`.
    """
    header, data = _split(save(quantize_state_dict(state, largest), metadata))
    if "__metadata__" in header:  # which safetensors writes in an order that changes from call to call
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors have to begin at a multiple of 8
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=packed, mode="wb", compresslevel=9, mtime=0) as file:
        file.write(len(text).to_bytes(8, "little") + text + data)
    write_bytes(path, packed.getvalue())


def load_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights (name -> float32 tensor `[rows, ...]`, on the CPU) and metadata of a file of `save_weights`.

    Raises:
        OSError: no such file, or one that cannot be read.
        ValueError: not gzip, cut off, far larger than any prior, no safetensors file inside, or one that
            `dequantize_state_dict` refuses.
    """
    packed = Path(path).read_bytes()
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            content = file.read(_LARGEST_CONTENT + 1)
        if len(content) > _LARGEST_CONTENT:
            raise ValueError(f"more than {_LARGEST_CONTENT >> 20} MiB under gzip")
        stored, metadata = safetensors_from_bytes(content)
    except (gzip.BadGzipFile, EOFError, zlib.error, SafetensorError) as error:
        raise ValueError(f"no whole safetensors file under gzip: {error}") from error
    return dequantize_state_dict(stored), metadata


def load_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a file of `save_weights`, of which no more than its beginning is read.

    Raises:
        OSError: no such file, or one that cannot be read.
        ValueError: not gzip, cut off, or no safetensors file inside.
    """
    try:
        with gzip.open(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _LARGEST_HEADER:
                raise ValueError(f"a header of more than {_LARGEST_HEADER >> 20} MiB")
            text = file.read(length)
        if len(text) < length:
            raise ValueError("it is cut off")
        metadata = json.loads(text).get("__metadata__", {})
    except (gzip.BadGzipFile, EOFError, zlib.error, RecursionError, AttributeError) as error:
        raise ValueError(f"no safetensors file under gzip: {error}") from error
    return dict(metadata)


def load_network(path: Path, make: Callable[[dict[str, Any]], Network]) -> Network:
    """The network that a file of `save_weights` describes, float32, in evaluation mode, its parameters frozen.

    Args:
        path: its metadata has the network's settings as JSON, under "config".
        make: from settings to a network.

    Raises:
        UserError: the file is damaged, or the network has other parameters.
    """
    try:
        state, metadata = load_weights(path)
        network = make(json.loads(metadata["config"]))
        network.load_state_dict(state)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        why = joined(error)
        raise UserError(f"the embedded prior's {path} cannot be read ({why}): install the package again") from error
    return network.eval().requires_grad_(False)


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file: the header's length in 8 bytes, little endian; the header, JSON; data."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]
