"""The functions of raymarching, as stable-dreamfusion and its forks call them, on a CPU, too.

Names, positional order, shapes and dtypes are theirs; inputs are read as float32. What differs:

- The samples of the rays lie in the order of the rays, so that a run repeats itself.
- Gradients through per-sample weights are exact.
- Nothing is moved to a GPU: what is computed is computed where the tensors are.
- A bitfield of this package, whose cells are in another order, is refused; `morton_bitfield` makes one of it that is
  not.

    from dreamfusion_fast.integrations import raymarching

    raymarching.install()  # where `raymarching` and `_raymarching` cannot be imported, they now can

A project's own `raymarching` package asks for the compiled module `_raymarching` first, so that after `install()` it
runs over the ops of this package, unedited. The functions of torch-ngp, with other arguments and results, are in
`dreamfusion_fast.integrations.raymarching.torch_ngp`.

The functions are loaded when first used: the ops below them take torch longer to register than all else here.
"""

from __future__ import annotations

from dreamfusion_fast.integrations._names import deferred
from dreamfusion_fast.integrations.raymarching._install import install

# Of each flavour its own.
OWN = ("composite_rays", "composite_rays_train", "march_rays", "march_rays_train")
# Of both flavours.
SHARED = ("morton3D", "morton3D_invert", "morton_bitfield", "near_far_from_aabb", "packbits", "sph_from_ray")
_MODULES = dict.fromkeys(OWN, f"{__name__}._stable_dreamfusion")
_MODULES |= dict.fromkeys((*SHARED, "flatten_rays"), f"{__name__}._grid")
__all__ = ["install", *_MODULES]

__getattr__, __dir__ = deferred(__name__, _MODULES)
