"""The functions of raymarching as torch-ngp calls them: other arguments and results than those of its forks.

Of each sample there is `deltas` = (dt, distance to the end of the sample before), and depths count from where a ray's
first step begins. All else is as in `dreamfusion_fast.integrations.raymarching`.
"""

from __future__ import annotations

from typing import Any

from dreamfusion_fast.integrations.raymarching._install import install, load

_FUNCTIONS = (
    "composite_rays",
    "composite_rays_train",
    "march_rays",
    "march_rays_train",
    "morton3D",
    "morton3D_invert",
    "morton_bitfield",
    "near_far_from_aabb",
    "packbits",
    "sph_from_ray",
)
__all__ = ["install", *_FUNCTIONS]


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = load("_torch_ngp", name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
