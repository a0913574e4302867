"""Names from the rest of the package, imported when they are first used."""

from __future__ import annotations

from dreamfusion_fast.integrations._names import deferred

_MODULES = {
    "check_number": "dreamfusion_fast.ops._checks",
    "check_same_length": "dreamfusion_fast.ops._checks",
    "check_tensor": "dreamfusion_fast.ops._checks",
    "march": "dreamfusion_fast.ops.march",
    "occupancy_pack": "dreamfusion_fast.ops.occupancy",
    "occupancy_update": "dreamfusion_fast.ops.occupancy",
    "revision_of": "dreamfusion_fast.fields.revision",
    "shown": "dreamfusion_fast.ops._checks",
    "traverse": "dreamfusion_fast.ops.traverse",
    "weights_from_alpha": "dreamfusion_fast.ops.weights",
    "weights_from_density": "dreamfusion_fast.ops.weights",
}

__getattr__, __dir__ = deferred(__name__, _MODULES)
