"""Frozen weights in 8 or 4 bits, by torchao and bitsandbytes: a part of the memory, at the price of their rounding.

What is rounded are the linear layers of a network's blocks, which hold nearly all its weights. Each is expanded to the
arithmetic's dtype when it runs, one at a time. The few layers in front of the blocks and behind them, embeddings, norms
and convolutions stay as they are.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

from dreamfusion_fast.networks.offload import installed

Quantisation = Literal["int8", "float8", "nf4"]

LIBRARY: dict[Quantisation, str] = {"int8": "torchao", "float8": "torchao", "nf4": "bitsandbytes"}
"""The library that each needs."""

# Bytes of a weight; with those of the scales, of which int8 and float8 have one per row and nf4 one per 64 weights.
_BYTES: dict[Quantisation, float] = {"int8": 1.01, "float8": 1.01, "nf4": 0.5 + 4 / 64}


def absent_library(kind: Quantisation) -> str | None:
    """The library that has to be installed for a kind of weights; None: it is there."""
    return None if installed(LIBRARY[kind]) else LIBRARY[kind]


def quantise(network: nn.Module, kind: Quantisation, device: torch.device) -> None:
    """Round a frozen network's weights, in place, and move it to `device` layer by layer.

    No more than one layer at a time is there as it was, so a device that holds the rounded weights holds all it takes.

    Args:
        network: in main memory.
        kind: "int8" (a scale per row), "float8" (e4m3, a scale per row; Micikevicius et al. 2022, arXiv 2209.05433) or
            "nf4" (4-bit normal floats, a scale per 64 weights; Dettmers et al. 2023, arXiv 2305.14314).
        device: where it will run.
    """
    for parent, name, linear in list(_linear_layers(network)):
        if kind == "nf4":
            setattr(parent, name, _in_four_bits(linear, device))
        else:
            _in_eight_bits(linear.to(device), kind)
    network.to(device)


def quantised_bytes(network: nn.Module, kind: Quantisation, dtype: torch.dtype) -> int:
    """Bytes that a network's weights take after `quantise`, the others in `dtype`. It may be on the meta device."""
    rounded = sum(linear.weight.numel() for _, _, linear in _linear_layers(network))
    every = sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))
    return int(rounded * _BYTES[kind]) + (every - rounded) * dtype.itemsize


def _linear_layers(network: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers of the blocks, which are in lists, each with its parent and its name there."""
    for blocks in network.children():
        if isinstance(blocks, nn.ModuleList):
            for parent in blocks.modules():
                for name, child in parent.named_children():
                    if type(child) is nn.Linear:
                        yield parent, name, child


def _in_eight_bits(linear: nn.Linear, kind: Quantisation) -> None:
    library: Any = importlib.import_module("torchao.quantization")
    form = library.Int8WeightOnlyConfig if kind == "int8" else library.Float8WeightOnlyConfig
    # The settings of torch.compile are the process's, and none of this is compiled.
    library.quantize_(linear, form(set_inductor_config=False))


def _in_four_bits(linear: nn.Linear, device: torch.device) -> nn.Module:
    layers: Any = importlib.import_module("bitsandbytes.nn")
    form: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": False}
    with torch.device("meta"):
        rounded = layers.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            **form,
        )
    weight = layers.Params4bit(linear.weight.detach(), requires_grad=False, module=rounded, **form)
    rounded.weight = weight.to(device)  # which rounds it
    rounded.bias = linear.bias
    return rounded.eval()
