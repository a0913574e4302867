"""What the drop-in takes from the rest of the package, imported when first used.

Ops register themselves with torch, which takes longer than to import all the rest of the drop-in.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "check_number": "ops._checks",
    "check_same_length": "ops._checks",
    "check_tensor": "ops._checks",
    "march": "ops.march",
    "occupancy_pack": "ops.occupancy",
    "occupancy_update": "ops.occupancy",
    "revision_of": "fields.revision",
    "shown": "ops._checks",
    "traverse": "ops.traverse",
    "weights_from_alpha": "ops.weights",
    "weights_from_density": "ops.weights",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dreamfusion_fast.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
