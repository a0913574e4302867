"""Modules that are made from a config and told of each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


class Updateable:
    def do_update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        for name in dir(self):
            part = None if name.startswith("_") else getattr(self, name, None)
            if isinstance(part, Updateable):
                part.do_update_step(epoch, global_step, on_load_weights)
        self.update_step(epoch, global_step, on_load_weights)

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        pass


class BaseModule(nn.Module, Updateable):
    @dataclass
    class Config:
        weights: str | None = None

    def __init__(self, cfg: dict[str, Any] | None = None, **parts: Any) -> None:
        super().__init__()
        self.cfg = self.Config(**(cfg or {}))
        self.configure(**parts)
        self.register_buffer("_dummy", torch.zeros(0), persistent=False)

    def configure(self) -> None:
        pass


def cube(radius: float) -> torch.Tensor:
    return torch.tensor([[-radius] * 3, [radius] * 3])
