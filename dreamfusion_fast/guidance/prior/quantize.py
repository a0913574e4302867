"""Weights as int8 with one float32 scale per output row: rounded to 1/254 of the row's largest.

Only the file is small: weights are expanded when they are loaded, and all arithmetic stays in the type that the model
runs in.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_SUFFIX = ".int8_scale"
_SMALLEST_QUANTIZED = 4096


def quantize_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Quantise every weight of two or more dimensions and at least 4096 elements; the rest stays float32.

    Args:
        state: name -> tensor `[rows, ...]`, any floating dtype.

    Returns:
        name -> int8 tensor of the same shape, with `name + ".int8_scale"` float32 `[rows]` beside it.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        value = tensor.detach().float().cpu()
        if value.ndim < 2 or value.numel() < _SMALLEST_QUANTIZED:
            out[name] = value.contiguous()
            continue
        scale = value.flatten(1).abs().amax(dim=1).clamp_min(1e-12) / 127.0
        shape = (-1,) + (1,) * (value.ndim - 1)
        out[name] = torch.round(value / scale.view(shape)).to(torch.int8).contiguous()
        out[name + SCALE_SUFFIX] = scale
    return out


def dequantize_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `quantize_state_dict` up to rounding: float32 tensors under their own names."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(SCALE_SUFFIX):
            continue
        scale = state.get(name + SCALE_SUFFIX)
        if scale is None:
            out[name] = tensor.float()
        else:
            out[name] = tensor.float() * scale.view((-1,) + (1,) * (tensor.ndim - 1))
    return out
