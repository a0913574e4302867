"""Renderers know geometry, material and background, and are not their parents."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from threestudio.utils.base import BaseModule, cube


class VolumeRenderer(BaseModule):
    @dataclass
    class Config(BaseModule.Config):
        radius: float = 1.0

    def configure(self, geometry: Any, material: Any, background: Any) -> None:
        self.sub_modules = SimpleNamespace(geometry=geometry, material=material, background=background)
        self.register_buffer("bbox", cube(self.cfg.radius))

    @property
    def geometry(self) -> Any:
        return self.sub_modules.geometry

    @property
    def material(self) -> Any:
        return self.sub_modules.material

    @property
    def background(self) -> Any:
        return self.sub_modules.background

    def set_geometry(self, geometry: Any) -> None:
        self.sub_modules.geometry = geometry

    def set_material(self, material: Any) -> None:
        self.sub_modules.material = material
