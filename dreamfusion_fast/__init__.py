"""Text to textured 3D mesh by score distillation, and the volume renderer underneath.

The names below are loaded when first used, so that importing the package is quick.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from dreamfusion_fast.errors import missing_package

__version__ = "0.1.0"

# How long torch's threads on a CPU wait for each other awake, in turns of a loop, before they sleep: some 0.2 ms. By
# itself it is 300,000, with which a step takes three times as long beside a busy process on each core. OpenMP reads it
# when torch is loaded; where that has happened, csrc/cpu/parallel.cpp finds another way.
if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

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
    "TriplaneField": "fields.triplane_field",
    "TriplaneFieldConfig": "fields.triplane_field",
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
