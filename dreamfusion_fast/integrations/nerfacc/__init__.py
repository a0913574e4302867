"""The interface of nerfacc 0.5 over the ops of this package: its names, shapes and meanings, on CPU and CUDA tensors.

``from dreamfusion_fast.integrations import nerfacc``, or `install` once, before the first ``import nerfacc``.
docs/drop-in.md says what is served, and what is not.
"""

from __future__ import annotations

from typing import Any

from dreamfusion_fast.integrations.nerfacc._install import install
from dreamfusion_fast.integrations.nerfacc.data_specs import RayIntervals, RaySamples
from dreamfusion_fast.integrations.nerfacc.estimators.occ_grid import OccGridEstimator
from dreamfusion_fast.integrations.nerfacc.estimators.prop_net import PropNetEstimator
from dreamfusion_fast.integrations.nerfacc.grid import ray_aabb_intersect, traverse_grids
from dreamfusion_fast.integrations.nerfacc.losses import distortion
from dreamfusion_fast.integrations.nerfacc.pack import pack_info
from dreamfusion_fast.integrations.nerfacc.pdf import importance_sampling, searchsorted
from dreamfusion_fast.integrations.nerfacc.scan import exclusive_prod, exclusive_sum, inclusive_prod, inclusive_sum
from dreamfusion_fast.integrations.nerfacc.version import __version__
from dreamfusion_fast.integrations.nerfacc.volrend import (
    accumulate_along_rays,
    accumulate_along_rays_,
    render_transmittance_from_alpha,
    render_transmittance_from_density,
    render_visibility_from_alpha,
    render_visibility_from_density,
    render_weight_from_alpha,
    render_weight_from_density,
    rendering,
)

__all__ = [
    "OccGridEstimator",
    "PropNetEstimator",
    "RayIntervals",
    "RaySamples",
    "__version__",
    "accumulate_along_rays",
    "accumulate_along_rays_",
    "distortion",
    "exclusive_prod",
    "exclusive_sum",
    "importance_sampling",
    "inclusive_prod",
    "inclusive_sum",
    "install",
    "pack_info",
    "ray_aabb_intersect",
    "render_transmittance_from_alpha",
    "render_transmittance_from_density",
    "render_visibility_from_alpha",
    "render_visibility_from_density",
    "render_weight_from_alpha",
    "render_weight_from_density",
    "rendering",
    "searchsorted",
    "traverse_grids",
]

_LEFT_OUT = {
    "cameras": "lens undistortion is left out",
    "cuda": "there are no functions below those of nerfacc's modules",
    "ContractionType": "it is of nerfacc 0.3, and this is the interface of 0.5",
    "OccupancyGrid": "it is of nerfacc 0.3, and this is the interface of 0.5: see OccGridEstimator",
    "ray_marching": "it is of nerfacc 0.3, and this is the interface of 0.5: see OccGridEstimator.sampling",
    "unpack_info": "it is of nerfacc 0.3, and this is the interface of 0.5",
    "VDBEstimator": "VDB grids are left out: see OccGridEstimator",
}


def __getattr__(name: str) -> Any:
    reason = _LEFT_OUT.get(name)
    why = f"nerfacc.{name} is not served by dreamfusion_fast: {reason}" if reason else f"nerfacc has no {name!r}"
    raise AttributeError(why)
