"""Geometries that are fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from threestudio.utils.base import BaseModule, cube


class BaseImplicitGeometry(BaseModule):
    @dataclass
    class Config(BaseModule.Config):
        radius: float = 1.0
        isosurface: bool = True
        isosurface_threshold: Any = 0.0

    def configure(self) -> None:
        self.register_buffer("bbox", cube(self.cfg.radius))
