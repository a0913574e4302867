"""Text to textured 3D mesh by score distillation, and the volume renderer underneath.

The names below are loaded when first used, so that importing the package is quick.
"""

from __future__ import annotations

import importlib
from typing import Any

from dreamfusion_fast.errors import missing_package

__version__ = "0.1.0"

# Public name -> the module it lives in.
_EXPORTS = {
    "Cameras": "rendering.cameras",
    "Field": "fields.base",
    "Generator": "training.generator",
    "Guidance": "guidance.contract",
    "HashGridField": "fields.hash_field",
    "HashGridFieldConfig": "fields.hash_field",
    "OccupancyGrid": "rendering.occupancy",
    "Rays": "rendering.rays",
    "RenderOutput": "rendering.volume.renderer",
    "RendererConfig": "rendering.volume.renderer",
    "UserError": "errors",
    "VolumeRenderer": "rendering.volume.renderer",
    "create_guidance": "guidance",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_EXPORTS[name]}")
    except ModuleNotFoundError as error:
        message = missing_package(error)
        if message is None:
            raise
        raise ImportError(f"{__name__}.{name}: {message}", name=error.name) from None
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
