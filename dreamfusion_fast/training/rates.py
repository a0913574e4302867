"""Learning rates: one for each kind of parameter, which falls along a cosine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dreamfusion_fast.training.sections import FirmConfig, OptimConfig


def rated(groups: Mapping[str, list[nn.Parameter]], config: OptimConfig | FirmConfig) -> list[dict[str, Any]]:
    """Groups of an optimiser, each with its peak rate: `lr_table` of the config for the kind "table", and so on."""
    return [{"params": parameters, "peak": getattr(config, f"lr_{kind}")} for kind, parameters in groups.items()]


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rates to this share of their peaks. Groups that have no peak keep theirs."""
    for group in optimizer.param_groups:
        if "peak" in group:
            group["lr"] = group["peak"] * factor


def cosine(progress: float, last: float) -> float:
    """1 at the beginning, `last` from progress 1 on, along half a cosine between."""
    return last + (1.0 - last) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
