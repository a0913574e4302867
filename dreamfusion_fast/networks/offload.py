"""Weights in main memory, brought to the GPU layer by layer while the layers before them run.

The price is one transfer of all weights per evaluation, and main memory for them, pinned. The streaming itself is
diffusers' group offloading, leaf by leaf.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

# Of the weights, what may be on the GPU at a time: the layer that runs and the one that comes next. The largest one
# of SD 1.5 is 3.4 % of it.
RESIDENT_SHARE = 0.1


def can_stream_weights(device: torch.device) -> bool:
    """Whether `stream_weights` works for a device: a GPU, with accelerate and a diffusers that has group offloading."""
    if device.type != "cuda" or not installed("accelerate"):
        return False
    try:
        from diffusers.hooks import apply_group_offloading  # noqa: F401 # since 0.33
    except ImportError:
        return False
    return True


def stream_weights(network: Any, device: torch.device) -> None:
    """Let a frozen network, in main memory, run on `device` from there: only its call does, in the order of layers.

    After each layer the host waits for it, so that no more than two layers' weights are on the GPU: launches that ran
    ahead would bring more of them there.
    """
    from diffusers.hooks import apply_group_offloading

    streams = device.type == "cuda"
    apply_group_offloading(
        network,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        non_blocking=streams,
        use_stream=streams,
    )


def installed(library: str) -> bool:
    """Whether there is such a library to import."""
    return importlib.util.find_spec(library) is not None
