"""Linear layers with initial weights that a generator decides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


def linear_layers(widths: Sequence[int], generator: torch.Generator | None) -> nn.ModuleList:
    """Layers between these widths: weights U(+-1/sqrt(fan in)) from `generator`, or torch's global one; biases 0."""
    layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
    with torch.no_grad():
        for layer in layers:
            assert isinstance(layer, nn.Linear)
            bound = 1.0 / math.sqrt(layer.in_features)
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.zero_()
    return layers
