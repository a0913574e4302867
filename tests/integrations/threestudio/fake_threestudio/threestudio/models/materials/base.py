"""Materials."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import threestudio
from threestudio.utils.base import BaseModule


class BaseMaterial(BaseModule):
    requires_normal = False


@threestudio.register("no-material")
class NoMaterial(BaseMaterial):
    @dataclass
    class Config(BaseMaterial.Config):
        n_output_dims: int = 3
        color_activation: str = "sigmoid"

    use_network = False

    def forward(self, features: Tensor, **others: Any) -> Tensor:
        assert features.shape[-1] == self.cfg.n_output_dims
        return getattr(torch, self.cfg.color_activation)(features)
